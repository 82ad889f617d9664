"""What the engine interface costs: a native engine beside its library's own loop, each in a process, in turns.

Run: python bench/native.py --engine openvino [--streams 1 8 32] [--rounds 5] [--new-tokens 64]

Prints median tokens per second of both at each number of requests at once, and the ratio; then the CPU time for each
token in the library's process, in the engine's, and in the caller, where tokens become text. Both have the same weights,
threads and limits; the library's loop neither makes text of its tokens nor hands them on. On a machine that is busy with
other things only the CPU times mean anything.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from calpaca import runtime
from calpaca.core.engine import Request, Sampling
from calpaca.core.engine_bench import prompts
from calpaca.core.engines.native import Job
from calpaca.core.engines.process import Worker
from calpaca.core.spec import ModelSpec

Measure = Callable[[list[tuple[int, ...]], int], float]
"""Token ids of prompts and the number of new tokens to tokens per second."""


def with_engine(engine: Any) -> Measure:
    def measure(asked: list[tuple[int, ...]], new_tokens: int) -> float:
        begin = time.perf_counter()
        handles = [engine.submit(Request(prompt, Sampling(max_new_tokens=new_tokens))) for prompt in asked]
        tokens = sum(handle.result().usage.completion_tokens for handle in handles)
        return tokens / (time.perf_counter() - begin)

    return measure


def with_openvino(arguments: dict[str, Any]) -> Measure:
    from calpaca.core.engines.openvino import OpenVinoRunner

    runner = OpenVinoRunner(**arguments)
    import numpy as np
    import openvino

    def measure(asked: list[tuple[int, ...]], new_tokens: int) -> float:
        begin = time.perf_counter()
        config = runner._generation(Job(asked[0], new_tokens, Sampling(), None))
        handles = [
            runner._pipeline.add_request(number, openvino.Tensor(np.array([prompt])), config)
            for number, prompt in enumerate(asked)
        ]
        while runner._pipeline.has_non_finished_requests():
            runner._pipeline.step()
        tokens = sum(len(handle.read_all()[0].generated_ids) for handle in handles)
        return tokens / (time.perf_counter() - begin)

    return measure


def with_llama_cpp(arguments: dict[str, Any]) -> Measure:
    from calpaca.core.engines.llama_cpp import LlamaCppRunner, _body

    runner = LlamaCppRunner(**arguments)

    def measure(asked: list[tuple[int, ...]], new_tokens: int) -> float:
        usages: list[int] = []

        def complete(prompt: tuple[int, ...]) -> None:
            body = _body(Job(prompt, new_tokens, Sampling(), None), 4096)
            body |= {"return_progress": False, "timings_per_token": False}
            last: list[Any] = []
            runner._server.handle_completions(body, lambda chunk: bool(last.append(chunk)))
            usages.append(last[-1]["usage"]["completion_tokens"])

        begin = time.perf_counter()
        threads = [Thread(target=complete, args=[prompt]) for prompt in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(usages) / (time.perf_counter() - begin)

    return measure


class Library:
    """The library's loop as the runner of a worker: started by the same means as the engine, used without it."""

    def __init__(self, engine: str, arguments: dict[str, Any]) -> None:
        self._measure = {"openvino": with_openvino, "llama_cpp": with_llama_cpp}[engine](arguments)
        self._jobs: list[tuple[int, Any]] = []

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def start(self, key: int, job: Any) -> None:
        self._jobs.append((key, job))

    def cancel(self, key: int) -> None: ...

    def step(self) -> list[Any]:
        key, (asked, new_tokens) = self._jobs.pop()
        return [(key, self._measure(asked, new_tokens), True)]

    def close(self) -> None: ...


class Answer:
    """One figure from the library's process."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def take(self, value: float) -> None:
        self.values.append(value)

    def fail(self, error: Exception) -> None:
        raise error

    def cancel(self) -> None: ...


def with_library(worker: Worker) -> Measure:
    def measure(asked: list[tuple[int, ...]], new_tokens: int) -> float:
        answer = Answer()
        worker.start(worker.new_key(), (asked, new_tokens), answer)
        while not answer.values:
            time.sleep(0.02)
        return answer.values[0]

    return measure


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Meter:
    """CPU time of a process for each token, over several measurements."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.seconds = self._begin = 0.0

    def __enter__(self) -> None:
        self._begin = cpu_seconds(self._pid)

    def __exit__(self, *_: object) -> None:
        self.seconds += cpu_seconds(self._pid) - self._begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["openvino", "llama_cpp"], default="openvino")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100,PTH120  # for the library's process
    model = runtime().model(ModelSpec(model=options.model, engine=options.engine))
    engine: Any = model.engine
    library = Worker("native:Library", {"engine": options.engine, "arguments": engine.worker._arguments}, "The library")
    library.open()
    measures = {"engine": with_engine(engine), "library": with_library(library)}
    print("requests  engine tok/s  library tok/s  ratio  CPU ms/token: library  engine  caller")
    for streams in options.streams:
        asked = [tuple(engine.encode(prompt)) for prompt in prompts(streams)]
        for measure in measures.values():
            measure(asked, 4)
        meters = {"engine": Meter(engine.worker.pid), "library": Meter(library.pid or 0), "caller": Meter(os.getpid())}
        rounds = []
        for number in range(options.rounds):
            figures = {}
            for name in sorted(measures, reverse=bool(number % 2)):  # each begins as often as the other
                with meters[name], meters["caller"] if name == "engine" else nullcontext():
                    figures[name] = measures[name](asked, options.new_tokens)
            rounds.append((figures["engine"], figures["library"]))
        tokens = options.rounds * streams * options.new_tokens
        milliseconds = {name: 1000 * meter.seconds / tokens for name, meter in meters.items()}
        engine_speed, library_speed = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b in rounds)
        print(
            f"{streams:8}  {engine_speed:12.1f}  {library_speed:13.1f}  {ratio:5.3f}"
            f"  {milliseconds['library']:21.2f}  {milliseconds['engine']:6.2f}  {milliseconds['caller']:6.2f}"
        )
    library.close()


if __name__ == "__main__":
    main()
