"""`calpaca generate` beside the engine driven directly, and beside one request after the other.

    python bench/generate.py [--lines 1000] [--rounds 3]

The engine is the test kit's, which gives each of 64 requests at once 100 tokens/s, so that what is measured is what
calpaca adds: the ledger, the seeds, the order. One by one is measured on a tenth of the lines and multiplied.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

from calpaca.core.engine import Sampling
from calpaca.core.generation import KIND, Generation
from calpaca.core.instructions import read_instructions
from calpaca.core.jobs import Ledger
from calpaca.core.predictions import write_predictions
from calpaca.testing import fake_model

WORDS = "a llama is a camelid of the Andes and"
SAMPLING = Sampling(max_new_tokens=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    texts = [f"Question number {number}?" for number in range(arguments.lines)]
    rounds = [
        [seconds(way, texts) for way in (directly, generated)] + [10 * seconds(one_by_one, texts[: len(texts) // 10])]
        for _ in range(arguments.rounds)
    ]
    straight, ours, serial = (median(column) for column in zip(*rounds, strict=True))
    print(f"{arguments.lines} lines of {len(WORDS.split())} words, medians of {arguments.rounds} rounds")
    print(f"engine directly  {straight:7.2f} s")
    print(f"generate         {ours:7.2f} s   {straight / ours:.2f} of it (target 0.95)")
    print(f"one by one       {serial:7.2f} s   generate is {serial / ours:.1f} times as fast (target 10)")


def seconds(way: Callable[[list[str]], None], texts: list[str]) -> float:
    started = perf_counter()
    way(texts)
    return perf_counter() - started


def model():
    return fake_model([WORDS], delay=0.01, slots=64)


def directly(texts: list[str]) -> None:
    asked = model()
    for handle in [asked.chat([{"role": "user", "content": text}], SAMPLING) for text in texts]:
        handle.result()


def generated(texts: list[str]) -> None:
    with TemporaryDirectory() as folder:
        generation = Generation(model(), read_instructions("\n".join(texts), "lines.txt"), SAMPLING, wrapped=True)
        with Ledger(Path(folder) / "jobs.sqlite").start(KIND, "Answer", {}) as job:
            assert len(list(write_predictions(generation, job, io.StringIO()))) == len(texts)


def one_by_one(texts: list[str]) -> None:
    asked = model()
    for text in texts:
        asked.chat([{"role": "user", "content": text}], SAMPLING).result()


if __name__ == "__main__":
    main()
