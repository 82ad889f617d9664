"""The engine that `auto` takes beside the libraries of all installed engines, each used directly, in turns.

Run: python bench/auto.py [--streams 1 8 32] [--rounds 2] [--new-tokens 32]

First the engines are measured as `calpaca bench engines` does, with 1 and 8 requests; what is recorded of your own
measurements is neither used nor changed. One stream counts as chat, more as load. Prints median tokens per second and
two ratios: to the fastest library of all, and to the fastest of those that run the weights as numbers, as `auto` does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from native import Measure, with_engine, with_library

from calpaca import runtime
from calpaca.core import engine_bench
from calpaca.core.engine_choice import (
    choose_engine,
    local_engines,
    model_key,
    record_measurements,
)
from calpaca.core.engines.process import Worker
from calpaca.core.files import ModelFiles, find_files
from calpaca.core.runtime import Runtime
from calpaca.core.spec import ModelSpec
from calpaca.core.weights import load_weights


def with_generate(files: ModelFiles) -> Measure:
    """One left-padded batch of transformers."""
    model = load_weights(files).model

    def measure(asked: list[tuple[int, ...]], new_tokens: int) -> float:
        begin = time.perf_counter()
        width = max(map(len, asked))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in asked])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked])
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=mask, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        return len(asked) * new_tokens / (time.perf_counter() - begin)

    return measure


def library(name: str, files: ModelFiles, host: Runtime) -> Measure:
    """A library's own loop, with the weights and the limits that our engine gives it."""
    if name == "transformers":
        return with_generate(files)
    engine: Any = host.model(files.spec.model_copy(update={"engine": name})).engine
    worker = Worker("native:Library", {"engine": name, "arguments": engine.worker._arguments}, f"The library of {name}")
    worker.open()
    return with_library(worker)


def measured(files: ModelFiles, host: Runtime) -> dict[str, bool]:
    """Measure and record the installed engines; whether each of those that run ran the weights as numbers."""
    found = [engine_bench.measure(name, files.spec, (1, 8)) for name in local_engines(host)]
    record_measurements(model_key(files), found)
    return {each.engine: each.whole for each in found if each.error is None}


def compare(
    streams: int, ours: Measure, libraries: dict[str, Measure], options: argparse.Namespace
) -> dict[str, float]:
    """Median tokens per second of `auto` and of each library."""
    measures = {"auto": ours, **libraries}
    speeds: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(-1, options.rounds):
        for name in sorted(measures, reverse=bool(number % 2)):
            asked = [tuple(options.encode(f"{number}. {text}")) for text in engine_bench.prompts(streams)]
            speed = measures[name](asked, options.new_tokens if number >= 0 else 2)
            if number >= 0:
                speeds[name].append(speed)
    return {name: statistics.median(each) for name, each in speeds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    with TemporaryDirectory() as places, runtime() as host:
        os.environ["CALPACA_DATA"] = places
        files = find_files(ModelSpec(model=options.model), host)
        whole = measured(files, host)
        libraries = {name: library(name, files, host) for name in whole}
        print("requests  " + "  ".join(f"{name:>12}" for name in libraries) + "          auto  of best  of whole")
        for streams in options.streams:
            host.purpose = "chat" if streams == 1 else "load"
            chosen = choose_engine(files, host)
            engine: Any = host.model(files.spec.model_copy(update={"engine": chosen})).engine
            options.encode = engine.encode
            speeds = compare(streams, with_engine(engine), libraries, options)
            auto = speeds.pop("auto")
            best = max(speeds.values())
            exact = max(speed for name, speed in speeds.items() if whole[name])
            columns = "  ".join(f"{speed:12.1f}" for speed in speeds.values())
            print(
                f"{streams:8}  {columns}  {auto:12.1f}  {auto / best:7.2f}  {auto / exact:8.2f}  ({chosen})", flush=True
            )


if __name__ == "__main__":
    main()
