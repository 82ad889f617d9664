"""How much faster map_reduce is than refine over the same chunks on the same engine, and what a book of 1 MB takes.

Run: python bench/summarize.py [--chunks 100] [--words 80] [--new-tokens 160] [--engine auto] [--model NAME]
     python bench/summarize.py --book [--megabytes 1] [--engine …]    (--engine fake: a scripted engine, memory alone)

The chunks are chapters of as many words each; both strategies send each of them once, with the same limit for every
answer, and keep nothing, so that no step is reused. The engine has answered once before. Prints seconds, prompts and
tokens of both, then the ratio of the times and of the CPU times (of this process alone: a native engine computes in another).
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import time
from dataclasses import dataclass
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from calpaca import runtime
from calpaca.core.engine import Sampling
from calpaca.core.model import Model
from calpaca.core.spec import ModelSpec
from calpaca_summarize.asking import Asker
from calpaca_summarize.coverage import CoverageLedger
from calpaca_summarize.plan import NOTE_TOKENS, Planner
from calpaca_summarize.prompts import SummaryPrompts, Wishes
from calpaca_summarize.source import Source, SourceText

WORDS = re.findall(
    r"\w+",
    """
the keeper of the old observatory turned a heavy dome by hand while rain fell on the hill and two donkeys ate hay
beside a locked hut where Ada Morrow had written down every meteor that crossed the northern sky since 1962
""",
)


@dataclass(frozen=True)
class Measured:
    """What a run took."""

    seconds: float
    cpu: float
    prompts: int
    prompt_tokens: int
    new_tokens: int
    chunks: int
    coverage: float


def chapters(count: int, words: int) -> str:
    """A text of chapters, no two alike."""
    generator = random.Random(0)
    sentences = [" ".join(generator.choices(WORDS, k=10)).capitalize() + "." for _ in range(count * words // 10)]
    size = words // 10
    return "".join(
        f"Chapter {number + 1}\n\n{' '.join(sentences[number * size : (number + 1) * size])}\n\n"
        for number in range(count)
    )


def summarize(
    model: Model, text: str, strategy: Literal["refine", "map_reduce"], new_tokens: int, chunk_size: int | None
) -> Measured:
    """Sum up a text, keeping nothing."""
    source = Source([SourceText("text", text)])
    prompts = SummaryPrompts(Wishes(), text)
    planner = Planner(model, prompts, answer=new_tokens, chunk_size=chunk_size, note=new_tokens)
    plan = planner.plan(source, strategy)
    asker = Asker(model, Sampling(repetition_penalty=1.1), plan.room, None)
    begin, cpu = time.perf_counter(), time.process_time()
    for _ in asker.run(plan.steps(prompts, by_section=False), plan.prompts(by_section=False)):
        pass
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    ledger = CoverageLedger(source.texts, plan.chunks)
    for step in asker.taken:
        for part in step.ask.parts:
            if step.answer.shown:
                ledger.sent(part.index)
    sent = sum(step.answer.usage.prompt_tokens for step in asker.taken)
    answered = sum(step.answer.usage.completion_tokens for step in asker.taken)
    return Measured(seconds, cpu, len(asker.taken), sent, answered, len(plan.chunks), ledger.coverage)


def compare(model: Model, arguments: argparse.Namespace) -> None:
    text = chapters(arguments.chunks, arguments.words)
    chunk_size = int(1.3 * len(model.engine.encode(text)) / arguments.chunks)
    model.chat([{"role": "user", "content": "Say yes."}], Sampling(max_new_tokens=4)).result()
    print(f"{model.name} on {model.engine.name}")
    measured: dict[str, Measured] = {}
    strategies: tuple[Literal["map_reduce", "refine"], ...] = ("map_reduce", "refine")
    for strategy in strategies:
        one = measured[strategy] = summarize(model, text, strategy, arguments.new_tokens, chunk_size)
        print(
            f"{strategy:<11}{one.seconds:>8.1f} s {one.cpu:>8.1f} CPU s {one.chunks:>5} chunks {one.prompts:>5} prompts "
            f"{one.prompt_tokens:>8,} tokens sent {one.new_tokens:>7,} answered   coverage {one.coverage}",
            flush=True,
        )
    fast, slow = measured["map_reduce"], measured["refine"]
    print(f"map_reduce is {slow.seconds / fast.seconds:.1f} x faster ({slow.cpu / fast.cpu:.1f} x in CPU time)")


def read_book(model: Model, arguments: argparse.Namespace) -> None:
    """Memory of this process before and after."""
    text = chapters(40, 4000)
    text = (text * (1 + int(arguments.megabytes * 1_000_000) // len(text)))[: int(arguments.megabytes * 1_000_000)]
    before = _peak()
    one = summarize(model, text, "map_reduce", arguments.new_tokens, None)
    print(f"{model.name} on {model.engine.name}: {len(text):,} characters, {one.chunks} chunks, {one.prompts} prompts")
    print(f"{one.seconds:.1f} s, {one.prompt_tokens:,} tokens sent, coverage {one.coverage}")
    print(f"peak memory of this process: {before:,.0f} MB before, {_peak():,.0f} MB after")


def _peak() -> float:
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _model(arguments: argparse.Namespace) -> Model:
    if arguments.engine == "fake":
        from calpaca.testing import fake_model

        return fake_model(["The keeper turned the dome by hand. It rained."], context_length=8192)
    options: dict[str, Any] = {"model": arguments.model, "engine": arguments.engine}
    return runtime().model(ModelSpec(**options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--words", type=int, default=80, help="words in a chunk")
    parser.add_argument("--new-tokens", type=int, default=NOTE_TOKENS, help="longest answer of every step")
    parser.add_argument("--model")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--book", action="store_true", help="read a book instead")
    parser.add_argument("--megabytes", type=float, default=1.0)
    arguments = parser.parse_args()
    model = _model(arguments)
    try:
        (read_book if arguments.book else compare)(model, arguments)
    finally:
        model.close()


if __name__ == "__main__":
    main()
