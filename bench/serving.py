"""The transformers engine under load, beside `generate` of transformers: same weights, one process, in turns.

Run: python bench/serving.py [one many …] [--dtype float32] [--rounds 3] [--threads 1]

Ratios are medians over the rounds; each scenario says what it compares.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from calpaca import runtime
from calpaca.core.engine import Request, Sampling
from calpaca.core.files import find_files
from calpaca.core.spec import ModelSpec
from calpaca.core.weights import load_weights

SCENARIOS: dict[str, Callable[[Bench], None]] = {}
FILLER = "The llama walked over the mountain and the alpaca followed it to the river where they drank. "


class Bench:
    """An engine, and the same weights as transformers runs them."""

    def __init__(self, dtype: str, rounds: int) -> None:
        self.rounds = rounds
        self.runtime = runtime()
        spec = ModelSpec(model="smollm2-135m-instruct", device="cpu", dtype=dtype, engine="transformers")
        self.engine: Any = self.runtime.model(spec).engine
        self.engine._eos_ids = frozenset()  # answers of the lengths asked for, as `generate` makes them
        self.reference = load_weights(find_files(spec, self.runtime)).model

    def prompt(self, tokens: int, name: str = "") -> tuple[int, ...]:
        ids = self.engine.encode(f"{name} {FILLER * (2 + tokens // 15)}")
        return tuple(ids[:tokens])

    def run(self, requests: list[Request]) -> None:
        for handle in [self.engine.submit(request) for request in requests]:
            handle.result()

    def generate(self, requests: list[Request]) -> None:
        """One left-padded batch, until its longest answer ends."""
        width = max(len(request.prompt) for request in requests)
        ids = torch.tensor([[0] * (width - len(request.prompt)) + list(request.prompt) for request in requests])
        mask = torch.tensor(
            [[0] * (width - len(request.prompt)) + [1] * len(request.prompt) for request in requests]
        )  # fmt: skip
        longest = max(request.sampling.max_new_tokens or 0 for request in requests)
        with torch.inference_mode():
            self.reference.generate(
                ids, attention_mask=mask, min_new_tokens=longest, max_new_tokens=longest, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip

    def compare(self, name: str, requests: list[Request]) -> None:
        """Print tokens per second of both, and the ratio."""
        tokens = sum(request.sampling.max_new_tokens or 0 for request in requests)
        ours, theirs = Clock(), Clock()
        for _ in range(self.rounds + 1):
            ours.measure(lambda: self.run(requests))
            theirs.measure(lambda: self.generate(requests))
        print(
            f"{name}: {tokens / ours.wall:.1f} tokens/s, generate {tokens / theirs.wall:.1f};"
            f" ratio {theirs.over(ours, 0):.2f}, of processor time {theirs.over(ours, 1):.2f}",
            flush=True,
        )


class Clock:
    """Seconds of wall and processor time that runs took; the first run prepares buffers and does not count."""

    def __init__(self) -> None:
        self.runs: list[tuple[float, float]] = []

    def measure(self, run: Callable[[], object]) -> None:
        begin = time.perf_counter(), time.process_time()
        run()
        self.runs.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))

    @property
    def wall(self) -> float:
        return statistics.median(wall for wall, _ in self.runs[1:])

    def over(self, other: Clock, kind: int) -> float:
        """How many times as long as another's, taken round by round."""
        return statistics.median(a[kind] / b[kind] for a, b in zip(self.runs[1:], other.runs[1:], strict=True))


def scenario(run: Callable[[Bench], None]) -> Callable[[Bench], None]:
    SCENARIOS[run.__name__] = run
    return run


@scenario
def one(bench: Bench) -> None:
    """One stream of 64 tokens."""
    bench.compare("one stream", [exactly(bench.prompt(24), 64)])


@scenario
def many(bench: Bench) -> None:
    """32 requests, prompts of 8 to 120 tokens, answers of 64 each."""
    lengths = random.Random(1)
    bench.compare("32 requests", [exactly(bench.prompt(lengths.randint(8, 120), str(n)), 64) for n in range(32)])


@scenario
def mixed(bench: Bench) -> None:
    """32 requests, prompts of 8 to 120 tokens, answers of 16 to 128."""
    lengths = random.Random(2)
    bench.compare(
        "32 requests with answers of mixed lengths",
        [exactly(bench.prompt(lengths.randint(8, 120), str(n)), lengths.randint(16, 128)) for n in range(32)],
    )


def exactly(prompt: tuple[int, ...], tokens: int) -> Request:
    return Request(prompt, Sampling(max_new_tokens=tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS), choices=[*SCENARIOS, []])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.dtype, options.rounds)
    for name in options.scenarios:
        SCENARIOS[name](bench)
    bench.runtime.close()


if __name__ == "__main__":
    main()
