"""What a file is, by the published sums or by its header."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from calpaca.core.errors import CorruptFileError, ModelNotFoundError
from calpaca.core.fingerprint import file_digest
from calpaca.core.known_files import identify, read_file_card

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


def test_the_list_is_whole_and_names_each_file_once() -> None:
    files = tomllib.loads((ROOT / "calpaca" / "core" / "known_files.toml").read_text("utf-8"))["file"]
    sums = [file["sha256"] for file in files]
    assert len(sums) == len(set(sums)) == 37
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in sums)
    assert len({(file["name"], file["model"]) for file in files}) == 37


@pytest.mark.parametrize(
    ("digest", "name"),
    [
        ("700df0d3013b703a806d2ae7f1bfb8e59814e3d06ae78be0c66368a50059f33d", "consolidated.00.pth of LLaMA 7B by Meta"),
        (
            "f8d380d63f77a08b7f447f5ec63f0bb1cde9ddeae2207e9f86e6b5f0f95a7955",
            "consolidated.00.pth of Chinese-LLaMA-Plus-7B merged with LLaMA",
        ),
        (
            "4ee0bf805c312a9a771624d481fbdb4485e1b0a70cd2a8da9f96137f177b795d",
            "adapter_model.bin of Chinese-Alpaca-Plus-7B, LoRA adapter",
        ),
        (
            "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347",
            "tokenizer.model of LLaMA and Llama 2 by Meta, 32,000 tokens",
        ),
    ],
)
def test_published_files_are_known(digest: str, name: str) -> None:
    assert identify(digest) == name


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared test data (../shared/data) is not here")
def test_a_real_file_is_recognised_whatever_it_is_called(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    file = tmp_path / "unknown.model"
    file.write_bytes((DATA / "chinese_sp.model").read_bytes())
    card = read_file_card(file)
    assert str(card.known).startswith("chinese_sp.model of Chinese-LLaMA-Alpaca")
    assert (card.tokens, card.remark) == (20_000, None)


def test_an_unknown_pth_says_that_its_sum_proves_nothing(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(2)}, tmp_path / "consolidated.00.pth")
    card = read_file_card(tmp_path / "consolidated.00.pth")
    assert (card.known, card.tensors, card.parameters, card.dtype) == (None, 2, 17, "bfloat16")
    assert "proves nothing" in str(card.remark)
    assert card.sha256 == file_digest(tmp_path / "consolidated.00.pth")


def test_other_files_are_only_looked_up(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("llama")
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert read_file_card(tmp_path / "notes.txt").remark == "No known file."
    assert read_file_card(tmp_path / "tokenizer.model").tokens is None


def test_damaged_weights_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        read_file_card(tmp_path / "model.safetensors")
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        read_file_card(tmp_path / "none.pth")


def test_code_in_a_bin_is_refused_and_never_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"w": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CorruptFileError, match="holds code instead of tensors"):
        read_file_card(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()
