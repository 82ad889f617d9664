"""Measuring engines: each in a process of its own, with the same prompts, at several numbers of requests at once."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from calpaca.core.engine import Handle, Sampling
from calpaca.core.engine_choice import Measurement
from calpaca.core.errors import CalpacaError
from calpaca.core.spec import ModelSpec

if TYPE_CHECKING:
    from calpaca.core.model import Model

CONCURRENCY = (1, 8, 32)
"""Requests at once."""

NEW_TOKENS = 64
ROUNDS = 3
"""Times that each number of requests is measured; the median counts."""

_ANIMALS = ("llama", "alpaca", "vicuña", "guanaco", "camel", "dromedary", "horse", "mule")
_LONGEST_LOAD = 1800.0  # seconds; preparing weights for an engine can take minutes


def prompts(count: int) -> list[str]:
    """Texts of different lengths that a model goes on with for long; no two begin alike, so no cache helps."""
    return [
        f"{number + 1}. The {_ANIMALS[number % 8]} of farm {number}: "
        + "it lives in the mountains, " * (1 + number % 5)
        for number in range(count)
    ]


def measure(engine: str, spec: ModelSpec, concurrency: Sequence[int] = CONCURRENCY) -> Measurement:
    """Load a model in a new process and measure; what goes wrong there is told in the measurement's `error`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_measure_here, args=(theirs, engine, spec.model_dump_json(), tuple(concurrency)), daemon=False
    )
    process.start()
    theirs.close()
    try:
        if not ours.poll(_LONGEST_LOAD):
            return Measurement(engine, error=f"gave no result within {_LONGEST_LOAD:.0f} s")
        result: Measurement = ours.recv()
        return result
    except EOFError:
        process.join()
        return Measurement(engine, error=f"ended with exit code {process.exitcode} and no result")
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _measure_here(results: Connection, engine: str, spec: str, concurrency: tuple[int, ...]) -> None:
    import calpaca

    try:
        with calpaca.runtime() as runtime:
            begin = time.perf_counter()
            model = runtime.model(ModelSpec.model_validate_json(spec).model_copy(update={"engine": engine}))
            model.generate("One, two,", Sampling(max_new_tokens=4)).result()
            load = time.perf_counter() - begin
            speeds = {streams: _throughput(model, streams) for streams in concurrency}
            first_token = statistics.median(_first_tokens(model))
            details = {name: str(value) for name, value in model.engine.capabilities().details.items()}
        results.send(Measurement(engine, speeds, first_token, load, _peak_memory(), details))
    except CalpacaError as error:
        results.send(Measurement(engine, error=str(error)))


def _throughput(model: Model, streams: int) -> float:
    """New tokens per second of `streams` requests at once; the median of some rounds."""
    return statistics.median(_round(model, streams, number) for number in range(ROUNDS))


def _round(model: Model, streams: int, number: int) -> float:
    texts = [f"Round {number}. {text}" for text in prompts(streams)]
    begin = time.perf_counter()
    handles: list[Handle] = [model.generate(text, Sampling(max_new_tokens=NEW_TOKENS)) for text in texts]
    tokens = sum(handle.result().usage.completion_tokens for handle in handles)
    return tokens / (time.perf_counter() - begin)


def _first_tokens(model: Model) -> Iterator[float]:
    for text in prompts(5):
        yield model.generate(f"First. {text}", Sampling(max_new_tokens=2)).result().timings.first_token


def _peak_memory() -> int:
    """Peak resident bytes of this process and, where the engine lives in one of its own, of that."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
