"""The walk of docs/models.md, from `.pth` files and two adapters to a GGUF file, with vocabularies as long as the real
ones: 32000, 49953 and 49954 pieces. Weights are small and random."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")

from safetensors.torch import save_file  # noqa: E402
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2  # noqa: E402

from calpaca.core.checkpoint.manifest import read_manifest  # noqa: E402
from calpaca.core.gguf_tokenizer import tokenizer_files  # noqa: E402
from calpaca.core.tokenizer import load_tokenizer  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HIDDEN, LAYERS = 64, 2
LLAMA, PLUS, ALPACA = 32000, 49953, 49954
TEXTS = ["羊驼住在安第斯山脉。", "A llama is no alpaca.", "混合 mixed 文本 42"]


@pytest.fixture(scope="module")
def pieces(mistral_pieces: Path, merged: Path) -> dict[int, bytes]:
    """Vocabularies by length, each the one before with pieces appended."""
    proto = sentencepiece_model_pb2.ModelProto.FromString((merged / "tokenizer.model").read_bytes())
    known = {piece.piece for piece in proto.pieces}
    rare = (chr(code) for code in range(0x3400, 0x4DB5))
    for character in (each for each in rare if each not in known):
        if len(proto.pieces) == PLUS:
            break
        proto.pieces.add(piece=character, score=0.0)
    plus = proto.SerializeToString()
    proto.pieces.add(piece="[PAD]", score=0.0)
    return {LLAMA: mistral_pieces.read_bytes(), PLUS: plus, ALPACA: proto.SerializeToString()}


@pytest.fixture
def folder(tmp_path: Path, pieces: dict[int, bytes], calpaca) -> Path:
    """The current folder, with what the walk begins with: `llama/7B`, and the two adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LLAMA, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "made")
    (tmp_path / "made" / "tokenizer.model").write_bytes(pieces[LLAMA])
    done = calpaca("models", "convert", "made", "--to", "pth", "--output", "llama/7B")
    assert done.code == 0, done.err
    shutil.rmtree(tmp_path / "made")
    write_adapter(tmp_path / "llama-plus-lora", pieces[PLUS], rows=PLUS, seed=1)
    write_adapter(tmp_path / "alpaca-plus-lora", pieces[ALPACA], rows=ALPACA, seed=2)
    return tmp_path


def write_adapter(folder: Path, pieces: bytes, *, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(8, HIDDEN, generator=generator) * 0.1
            tensors[f"{module}.lora_B.weight"] = torch.randn(HIDDEN, 8, generator=generator) * 0.1
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.weight"] = torch.randn(rows, HIDDEN, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
              "modules_to_save": ["embed_tokens", "lm_head"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(pieces)


def printed_commands() -> list[list[str]]:
    """The commands of the walk, without `calpaca` and comments."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    block = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    return [shlex.split(line.removeprefix("$ calpaca"), comments=True) for line in block.splitlines()]


def test_the_printed_commands_run_one_after_the_other_and_ids_stay_equal(
    calpaca, folder: Path, pieces: dict[int, bytes]
) -> None:
    *workshop, answer = printed_commands()
    assert [command[1] for command in workshop] == ["show", "convert", "merge", "verify", "show", "export"]
    told = {}
    for command in workshop:
        result = calpaca(*command)
        assert result.code == 0, (command, result.err)
        told[" ".join(command[:3])] = result.out + result.err
    assert "the same at 100.0% of the positions" in told["models merge llama-7b"]
    assert f"{ALPACA:,}" in told["models show alpaca-plus"] or str(ALPACA) in told["models show alpaca-plus"]
    check_ids(folder, pieces)
    check_lineage(folder)
    assert answer[:2] == ["run", "retrieval_qa"]
    (folder / "doc.txt").write_text("A llama carries salt over the mountains.", encoding="utf-8")
    result = calpaca(*answer, "--max-new-tokens", "4")
    assert result.code == 0, result.err


def check_ids(folder: Path, pieces: dict[int, bytes]) -> None:
    """SentencePiece, the merged folder and the GGUF file give the same ids; [PAD] is the last."""
    expected = SentencePieceProcessor(model_proto=pieces[ALPACA])
    from_gguf = folder / "from-gguf"
    from_gguf.mkdir()
    for name, content in tokenizer_files(folder / "alpaca-plus-gguf" / "model-q8_0.gguf").items():
        (from_gguf / name).write_bytes(content)
    for place in (folder / "alpaca-plus", from_gguf):
        found = load_tokenizer(place)
        assert len(found) == ALPACA
        assert [found.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
        assert found.encode("但[PAD]", special_tokens=True)[-1] == ALPACA - 1


def check_lineage(folder: Path) -> None:
    manifest = read_manifest(folder / "alpaca-plus")
    assert manifest is not None
    assert [each.name for each in manifest.lineage.inputs] == ["llama-7b", "llama-plus-lora", "alpaca-plus-lora"]
    assert json.loads((folder / "alpaca-plus" / "config.json").read_text())["vocab_size"] == ALPACA


def test_the_reversed_order_is_refused_with_the_command_that_runs(calpaca, folder: Path) -> None:
    assert calpaca("models", "convert", "llama/7B", "--output", "llama-7b").code == 0
    merge = next(command for command in printed_commands() if "merge" in command)
    first, second = (number for number, word in enumerate(merge) if word.endswith("-lora"))
    reversed_order = list(merge)
    reversed_order[first], reversed_order[second] = merge[second], merge[first]
    refused = calpaca(*reversed_order)
    assert refused.code == 3
    assert f"alpaca-plus-lora has {ALPACA} tokens and llama-plus-lora, after it, only {PLUS}." in refused.err
    assert not (folder / "alpaca-plus").exists()
    typed = re.search(r"Type: calpaca (.*)", refused.err)
    assert typed is not None
    assert calpaca(*shlex.split(typed[1])).code == 0
