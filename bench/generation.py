"""Generation speed: the transformers engine beside plain `model.generate`, in one process and in turns.

Run: python bench/generation.py [--rounds 5] [--new-tokens 64] [--threads 1]

Prints medians of the time to first token and of tokens per second, for one prompt and for eight of different lengths,
and the ratio of the two. `generate` gets the eight as one left-padded batch; the engine as eight requests.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import TextStreamer

from calpaca import runtime
from calpaca.core.engine import Request, Sampling
from calpaca.core.spec import ModelSpec

PROMPTS = [
    f"Here is a long list of {count} animals that live in the mountains: " * (1 + count % 4) for count in range(8)
]


class FirstToken(TextStreamer):
    """Notes when `generate` hands out its first new token."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0.0

    def put(self, value: Any) -> None:  # noqa: ARG002  # the prompt first, then each token
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        pass


def with_engine(model: Any, prompts: list[list[int]], new_tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the end, and the number of new tokens."""
    begin = time.perf_counter()
    sampling = Sampling(max_new_tokens=new_tokens)
    handles = [model.engine.submit(Request(tuple(prompt), sampling)) for prompt in prompts]
    results = [handle.result() for handle in handles]
    total = time.perf_counter() - begin
    return results[0].timings.first_token, total, sum(result.usage.completion_tokens for result in results)


def with_generate(model: Any, prompts: list[list[int]], new_tokens: int) -> tuple[float, float, int]:
    network = model.engine._weights.model
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    streamer = FirstToken() if len(prompts) == 1 else None
    begin = time.perf_counter()
    with torch.inference_mode():
        output = network.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, streamer=streamer, pad_token_id=0
        )
    total = time.perf_counter() - begin
    return (streamer.at - begin if streamer else total), total, (output.shape[1] - width) * len(prompts)


def measure(run: Callable[..., tuple[float, float, int]], *arguments: Any) -> tuple[float, float]:
    """Time to first token in seconds, tokens per second."""
    first, total, tokens = run(*arguments)
    return first, tokens / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with runtime() as loaded:
        model = loaded.model(ModelSpec(model="smollm2-135m-instruct", device="cpu", dtype="float32"))
        prompts = [model.engine.encode(text) for text in PROMPTS]
        for batch in (prompts[:1], prompts):
            compare(model, batch, options.rounds, options.new_tokens)


def compare(model: Any, prompts: list[list[int]], rounds: int, new_tokens: int) -> None:
    ways = {"engine": with_engine, "generate": with_generate}
    for run in ways.values():
        run(model, prompts, 4)  # the first run prepares buffers
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            seen[name].append(measure(run, model, prompts, new_tokens))
    speeds = {name: statistics.median(speed for _, speed in runs) for name, runs in seen.items()}
    firsts = {name: statistics.median(first for first, _ in runs) for name, runs in seen.items()}
    for name in ways:
        first = f", first token after {firsts[name]:.3f} s" if len(prompts) == 1 or name == "engine" else ""
        print(f"{len(prompts)} prompt(s), {name}: {speeds[name]:.1f} tokens/s{first}")
    print(f"{len(prompts)} prompt(s), engine / generate: {speeds['engine'] / speeds['generate']:.2f}")


if __name__ == "__main__":
    main()
