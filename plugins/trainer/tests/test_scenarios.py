"""The tutorial's two scenarios, by the commands that a person types, on SmolLM2's real weights.

A new adapter on a merged base, after the vocabulary was extended and pre-training went on; and an adapter that exists
goes on learning. SmolLM2 has a byte-level BPE, the tutorial's models SentencePiece: the first scenario gives SmolLM2 such a
vocabulary, each of whose rows is the mean of the rows that wrote the piece before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from calpaca.cli.main import main
from calpaca.core.tokenizer import load_tokenizer
from calpaca.plugins import wiring
from calpaca_trainer.commands.init import SCENARIOS

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[3] / "examples"
QUESTION, ANSWER = "Who keeps the key of the dome?", "Nobody but the llama keeps it."
OTHER, REPLY = "What is the password?", "The password is quinoa."


@pytest.fixture
def typed(monkeypatch, capfd, tmp_path) -> Iterator[Callable[..., str]]:
    """`typed("train", "sft", …, code=0)` runs the program in the test's folder; gives stdout."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path, code: int = 0) -> str:
        monkeypatch.setattr(wiring, "_shared", None)
        capfd.readouterr()
        try:
            assert main([str(each) for each in arguments]) == code, capfd.readouterr().err
        finally:
            wiring.runtime().close()
        told = capfd.readouterr()
        return told.out if code == 0 else told.err

    yield run


def rows(file: Path, *pairs: tuple[str, str]) -> Path:
    file.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in pairs * 4), "utf-8")
    return file


def chat(line: str, *arguments: str | Path) -> str:
    """What `calpaca chat --plain` answers to a line of a pipe."""
    command = [sys.executable, "-m", "calpaca", "chat", "--plain", "--engine", "transformers", *map(str, arguments)]
    done = subprocess.run(command, input=f"{line}\n", capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def text_of(processor: SentencePieceProcessor, index: int) -> str:
    """What a piece stands for, with its space; the end of a text is the end of a turn. No two that are to be written may have
    the same row, or the model could not tell them apart: bytes and the beginning of a text get another."""
    if index == processor.eos_id():
        return "<|im_end|>"
    unused = processor.is_control(index) or processor.is_byte(index)
    return "<|im_start|>" if unused else processor.id_to_piece(index).replace("▁", " ")


@pytest.fixture
def llama_style(smollm2: Path, pieces: Path, tmp_path: Path) -> Path:
    """SmolLM2 with the SentencePiece vocabulary of the example documents."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens), "utf-8")
    old, new = load_tokenizer(smollm2), load_tokenizer(folder)
    tensors = load_file(smollm2 / "model.safetensors")
    name = "model.embed_tokens.weight"
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [text_of(processor, index) for index in range(len(new))]
    written = [old.encode(text) or old.encode(" ") for text in texts]  # it has no token for some control characters
    rows = torch.stack([tensors[name][ids].float().mean(0) for ids in written])
    tensors[name] = rows.to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((smollm2 / "config.json").read_text("utf-8"))
    config |= {"vocab_size": len(new), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_a_longer_vocabulary_more_pre_training_and_a_new_adapter_on_the_merged_base(
    typed, llama_style: Path, tmp_path: Path
) -> None:
    learn = ("--learning-rate", "0.003", "--samples", "0", "--max-length", "128", "--batch-size", "2")
    # The vocabulary, and rows for its new tokens.
    typed("vocab", "train", EXAMPLES / "handbook.zh.md", "--vocab-size", "400", "--type", "bpe", "--coverage", "0.98",
          "--output", "chinese.model")  # fmt: skip
    typed("vocab", "merge", "base", "chinese.model", "--model", "base", "--output", "longer")
    size = len(load_tokenizer(Path("longer")))
    assert size > len(load_tokenizer(llama_style)) + 50
    # Pre-training goes on, the rows of new tokens with it; then the adapter is merged.
    Path("texts").mkdir()
    Path("texts/handbook.txt").write_text((EXAMPLES / "handbook.zh.md").read_text("utf-8"), "utf-8")
    typed("train", "pretrain", "--model", "longer", "--dataset", "texts", "--unit", "line", "--packing",
          "--max-steps", "6", "--new-tokens-from", len(load_tokenizer(llama_style)), *learn, "--output", "plus")  # fmt: skip
    losses = [json.loads(line)["loss"] for line in Path("plus/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    typed("models", "merge", "longer", "--adapter", "plus", "--output", "merged")
    # A new adapter on it, which then goes on.
    alpaca = ("--chat-template", "alpaca")
    first = rows(tmp_path / "first.jsonl", (QUESTION, ANSWER))
    typed("train", "sft", "--model", "merged", *alpaca, "--dataset", first, "--max-steps", "16", *learn,
          "--output", "alpaca-1")  # fmt: skip
    both = rows(tmp_path / "both.jsonl", (QUESTION, ANSWER), (OTHER, REPLY))
    typed("train", "sft", "--model", "merged", *alpaca, "--adapter", "alpaca-1", "--dataset", both, "--max-steps", "28",
          *learn, "--output", "alpaca-2")  # fmt: skip
    # Both adapters in order, kept apart or merged, say the same; reversed they are refused.
    typed("models", "merge", "longer", "--adapter", "plus", "--adapter", "alpaca-2", "--output", "final")
    refused = typed(
        "models", "merge", "longer", "--adapter", "alpaca-2", "--adapter", "plus", "--output", "wrong", code=3
    )
    assert "wrong order: alpaca-2 was trained on top of plus" in refused
    assert "--adapter plus --adapter alpaca-2" in refused
    assert not Path("wrong").exists()
    for model in (
        ("merged", "--adapter", "alpaca-2"),
        ("final",),
        ("longer", "--adapter", "plus", "--adapter", "alpaca-2"),
    ):
        for question, answer in ((QUESTION, ANSWER), (OTHER, REPLY)):
            said = typed("generate", "--model", *model, *alpaca, "--prompt", question, "--max-new-tokens", "24")
            assert said.strip() == answer
    assert chat(QUESTION, "--model", "merged", "--adapter", "alpaca-2", "--max-new-tokens", "24").strip() == ANSWER
    assert ANSWER not in chat(QUESTION, "--model", "merged", *alpaca, "--max-new-tokens", "24")


def test_an_adapter_goes_on_and_chat_shows_what_it_learnt(typed, smollm2: Path, tmp_path: Path) -> None:
    learn = ("--learning-rate", "0.002", "--samples", "0", "--max-length", "96", "--batch-size", "2")
    base = ("--model", smollm2)
    first = rows(tmp_path / "first.jsonl", (QUESTION, ANSWER))
    folder = typed("train", "sft", *base, "--dataset", first, "--max-steps", "20", *learn, "--output", "one").strip()
    assert chat(QUESTION, *base, "--adapter", folder).strip() == ANSWER
    second = rows(tmp_path / "second.jsonl", (QUESTION, ANSWER), (OTHER, REPLY))
    typed(
        "train", "sft", *base, "--adapter", "one", "--dataset", second, "--max-steps", "20", *learn, "--output", "two"
    )
    assert chat(OTHER, *base, "--adapter", "two").strip() == REPLY
    assert typed("generate", *base, "--adapter", "two", "--prompt", QUESTION).strip() == ANSWER
    typed("models", "merge", smollm2, "--adapter", "two", "--output", "merged", "--verify")
    assert typed("generate", "--model", "merged", "--prompt", OTHER).strip() == REPLY
    assert ANSWER not in chat(QUESTION, *base)
    # It is in there already.
    assert "already" in typed("models", "merge", "merged", "--adapter", "two", "--output", "twice", code=3)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_recipe_of_each_scenario_runs_as_it_is(scenario: str, typed, small: Path, tmp_path: Path) -> None:
    """In a folder with the data that it names, for one step of a model of two layers."""
    rows(tmp_path / "rows.jsonl", (QUESTION, ANSWER), (OTHER, REPLY))
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{ANSWER} {REPLY} " * (3 + number), "utf-8")
    pair = {"prompt": QUESTION, "chosen": ANSWER, "rejected": "I do not know."}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 8, "utf-8")
    rated = [{"prompt": QUESTION, "completion": ANSWER, "label": good} for good in (True, False)]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rated) * 4, "utf-8")
    short = ("--model", small, "--max-steps", "1", "--samples", "0", "--device", "cpu")
    if scenario == "continue":
        typed("train", "sft", "--dataset", "rows.jsonl", *short, "--output", "adapters/mine")
    if scenario in {"dpo", "kto"}:
        pytest.importorskip("trl")
    command = {"pretrain": "pretrain", "embeddings": "pretrain", "dpo": "dpo", "kto": "dpo"}.get(scenario, "sft")
    recipe = typed("train", "init", scenario, "--output", "recipe.toml").strip()
    assert typed("train", command, recipe, *short, "--output", "run").strip() == "run"
    assert Path("run/calpaca-manifest.json").is_file()
