"""A small real model for training: the first two layers of SmolLM2, with its tokenizer; and rows to train on."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.plugins.wiring import build_runtime
from calpaca_trainer.recipe import Recipe, read_recipe
from calpaca_trainer.training import prepare, train

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="session")
def small(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with two of SmolLM2's thirty layers, its embeddings and its tokenizer."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "small"
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    for file in smollm2.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaMA-style SentencePiece vocabulary, trained on the example documents."""
    import sentencepiece

    lines = [
        line for name in ("handbook.md", "handbook.zh.md") for line in (EXAMPLES / name).read_text("utf-8").splitlines()
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=2000,
        character_coverage=0.98, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return build_runtime(Settings())


ROWS = [
    {
        "instruction": f"What is {number} and {number}?",
        "input": "",
        "output": f"It is {2 * number}. " + "So it is! " * (number % 5),
    }
    for number in range(24)
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A JSONL file of 24 rows in Alpaca's form."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.fixture
def recipe(small: Path, rows: Path) -> Callable[..., Recipe]:
    """`recipe(**changes)`: a recipe that takes a second."""

    def make(**changes: Any) -> Recipe:
        values = {
            "model": str(small), "datasets": [str(rows)], "dtype": "float32", "max_length": 128, "max_steps": 3,
            "batch_size": 2, "samples": 0, "learning_rate": 1e-3, "warmup": 0.0, "rank": 4,
        }  # fmt: skip
        return read_recipe(None, values | changes, "train sft")

    return make


@pytest.fixture
def run(recipe: Callable[..., Recipe], runtime: Runtime, tmp_path: Path) -> Callable[..., Path]:
    """`run(name, stage=…, **changes)` trains and gives the run folder."""

    def go(name: str = "run", stage: Any = "sft", **changes: Any) -> Path:
        output = tmp_path / name
        train(prepare(recipe(**changes), stage, runtime), output, runtime, {})
        return output

    return go
