"""Training data becoming tokens: from a file of rows to the cache, beside the tokenizer's own batch on finished texts.

Run: python bench/tokenising.py [--rows 100000] [--rounds 2]

The rows are Alpaca's, out of sentences of the example documents. calpaca reads and checks each row, renders its template,
encodes it, marks what is learnt and writes the cache; the tokenizer is given the rendered texts, a thousand at a time,
and nothing else is done with the ids. Processor time, one thread, in turns; `cached` is the same command once more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).parents[1]


def write_rows(file: Path, count: int) -> None:
    text = (ROOT / "examples/handbook.md").read_text("utf-8")
    sentences = [sentence.strip() + "." for sentence in text.replace("\n", " ").split(".") if sentence.strip()]
    chance = random.Random(0)
    with file.open("w", encoding="utf-8") as rows:
        for _ in range(count):
            answer = " ".join(chance.choices(sentences, k=chance.randint(1, 5)))
            rows.write(json.dumps({"instruction": chance.choice(sentences), "output": answer}) + "\n")


def measured(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def load(file: Path, prompting: Any) -> Any:
    from calpaca_trainer.dataset import DataSource, load_dataset
    from calpaca_trainer.recipe import DataOptions

    return load_dataset([DataSource(file)], prompting.rendering(DataOptions(max_length=2048), "sft"))


def rendered(file: Path, prompting: Any) -> list[str]:
    from calpaca_trainer.conversation import Conversation, read_conversation
    from calpaca_trainer.rows import Row, read_rows

    conversations = (read_conversation(row) for row in read_rows(file) if isinstance(row, Row))
    messages = (each.messages for each in conversations if isinstance(each, Conversation))
    return [prompting.template.render(each, answer=False) for each in messages]


def in_batches(texts: list[str], size: int = 1000) -> Iterator[list[str]]:
    source = iter(texts)
    while batch := list(islice(source, size)):
        yield batch


def encode(texts: list[str], tokenizer: Any) -> None:
    for batch in in_batches(texts):
        tokenizer(batch, add_special_tokens=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    from calpaca import runtime
    from calpaca_trainer.recipe import read_recipe
    from calpaca_trainer.training import load_subject

    _, prompting = load_subject(read_recipe(None, {"model": "smollm2-135m-instruct"}, "bench"), runtime())
    os.environ["CALPACA_CACHE"] = str(folder / "cache")  # from here on, since the model lies in the usual one
    ours, theirs = [], []
    for turn in range(options.rounds):
        file = folder / f"rows{turn}.jsonl"
        write_rows(file, options.rows + turn)  # another file: the cache knows contents
        texts = rendered(file, prompting)
        theirs.append(measured(lambda texts=texts: encode(texts, prompting.tokenizer.hf))[0])  # type: ignore[misc]
        seconds, dataset = measured(lambda file=file: load(file, prompting))  # type: ignore[misc]
        ours.append(seconds)
    cached, _ = measured(lambda: load(file, prompting))
    best, peer = statistics.median(ours), statistics.median(theirs)
    print(f"{len(dataset)} examples, {int(dataset.lengths.sum())} tokens")
    print(f"calpaca {best:.1f} s, the tokenizer's batch {peer:.1f} s: {peer / best:.2f} x; cached {cached:.2f} s")


if __name__ == "__main__":
    main()
