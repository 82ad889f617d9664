"""`calpaca models convert` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """An original checkpoint of random numbers, in one part."""
    folder = tmp_path / "7B"
    folder.mkdir()
    layer = {f"attention.{name}": (32, 32) for name in ("wq", "wk", "wv", "wo")}
    layer |= {"feed_forward.w1": (48, 32), "feed_forward.w2": (32, 48), "feed_forward.w3": (48, 32)}
    layer |= {"attention_norm": (32,), "ffn_norm": (32,)}
    shapes = {"tok_embeddings": (50, 32), "norm": (32,), "output": (50, 32)}
    shapes |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    torch.save(
        {f"{name}.weight": torch.randn(shape).half() for name, shape in shapes.items()}, folder / "consolidated.00.pth"
    )
    (folder / "params.json").write_text(
        json.dumps({"dim": 32, "n_heads": 4, "n_layers": 1, "norm_eps": 1e-6, "vocab_size": -1})
    )
    return folder


def test_the_folder_that_was_written_is_the_answer(calpaca, original: Path) -> None:
    done = calpaca("models", "convert", "7B", "--output", "hf")
    assert (done.code, done.out) == (0, "hf\n")
    assert "7B is an original LLaMA checkpoint in 1 part (.pth)." in done.err
    assert "context length: 2048 is taken" in done.err
    assert calpaca("models", "verify", "hf").code == 0
    back = calpaca("models", "convert", "hf", "--to", "pth", "--parts", "2", "--output", "back", "--json")
    assert back.code == 0
    assert [file["name"] for file in back.json["files"]] == ["consolidated.00.pth", "consolidated.01.pth"]
    assert back.json["weights"]
    verified = calpaca("models", "verify", "back")
    assert verified.code == 0
    assert "24 tensors" in verified.out
    part = Path("back/consolidated.01.pth")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    damaged = calpaca("models", "verify", "back")
    assert damaged.code == 1
    assert "consolidated.01.pth" in damaged.out


def test_a_dry_run_writes_nothing_and_says_what_it_would(calpaca, original: Path) -> None:
    done = calpaca("models", "convert", "7B", "--dry-run")
    assert done.code == 0
    assert "model.safetensors" in done.out
    assert "A Hugging Face folder (safetensors): 24,000 bytes of weights in all." in done.out
    assert [path.name for path in Path().iterdir() if path.name not in {"7B", "calpaca-data", "calpaca-config"}] == []


def test_what_has_the_form_already_is_left_alone(calpaca, original: Path) -> None:
    calpaca("models", "convert", "7B", "--output", "hf")
    done = calpaca("models", "convert", "hf", "--output", "again")
    assert (done.code, done.out) == (0, "hf\n")
    assert "It is in that form already; nothing was written." in done.err
    assert not Path("again").exists()
    assert calpaca("models", "convert", "hf", "--json").json["files"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["7B"], 2, "Add --output DIR"),
        (["7B", "--to", "hf", "--parts", "2", "--output", "x"], 2, "has no parts"),
        (["7B", "--parts", "3", "--output", "x"], 2, "one of 1, 2, 4"),
        (["7B/params.json", "--output", "x"], 3, "Name the folder that it lies in"),
        (["nowhere", "--output", "x"], 3, "nowhere"),
        (["7B", "--shard-size", "much", "--output", "x"], 2, "'much' is no size"),
        (["7B", "--output", "7B"], 2, "7B exists already"),
    ],
)
def test_what_cannot_be_done_is_said(calpaca, original: Path, arguments: list[str], code: int, message: str) -> None:
    done = calpaca("models", "convert", *arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert not Path("x").exists()


def test_a_gguf_file_becomes_an_original_checkpoint(calpaca, smollm2_gguf: Path) -> None:
    done = calpaca("models", "convert", str(smollm2_gguf), "--to", "pth", "--output", "pth")
    assert (done.code, done.out) == (0, "pth\n")
    assert json.loads(Path("pth/params.json").read_text())["n_kv_heads"] == 3
