"""The transformers engine under load, beside `generate` of transformers: same weights, one process, in turns.

Run: python bench/serving.py [one many …] [--dtype float32] [--rounds 3] [--threads 1]

Ratios are medians over the rounds; each scenario says what it compares.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from calpaca import runtime
from calpaca.core.engine import Request, Sampling
from calpaca.core.files import find_files
from calpaca.core.spec import ModelSpec
from calpaca.core.weights import load_weights

SCENARIOS: dict[str, Callable[[Bench], None]] = {}
XQUAD = Path(__file__).parents[2] / "shared/data/xquad_en_first24.json"
FILLER = "The llama walked over the mountain and the alpaca followed it to the river where they drank. "


class Bench:
    """An engine, and the same weights as transformers runs them."""

    def __init__(self, dtype: str, rounds: int) -> None:
        self.rounds = rounds
        self.runtime = runtime()
        spec = ModelSpec(model="smollm2-135m-instruct", device="cpu", dtype=dtype, engine="transformers")
        self.model = self.runtime.model(spec)
        self.engine: Any = self.model.engine
        self.eos_ids = self.engine._eos_ids
        self.engine._eos_ids = frozenset()  # answers of the lengths asked for, as `generate` makes them
        self.reference = load_weights(find_files(spec, self.runtime)).model

    def prompt(self, tokens: int, name: str = "") -> tuple[int, ...]:
        ids = self.engine.encode(f"{name} {FILLER * (2 + tokens // 15)}")
        return tuple(ids[:tokens])

    def run(self, requests: list[Request]) -> None:
        """All requests at once, without what is kept of earlier ones."""
        self.engine.batch.prefixes.clear()
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
        speeds = f"{tokens / ours.wall:.1f} tokens/s, generate {tokens / theirs.wall:.1f}"
        self.report(f"{name}: {speeds}; ratio", theirs, ours)

    def report(self, text: str, one: Clock, other: Clock) -> None:
        print(f"{text} {one.over(other, 0):.2f}, of processor time {one.over(other, 1):.2f}", flush=True)


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
    """One stream of 64 tokens, its prompt repeating itself a little, as text does; then without guesses."""
    bench.compare("one stream", [exactly(bench.prompt(24), 64)])
    with without_guesses():
        bench.compare("one stream without guesses", [exactly(bench.prompt(24), 64)])


@scenario
def first(bench: Bench) -> None:
    """Time to first token: one token after prompts of 24 and 400, nothing of them kept."""
    for length in (24, 400):
        bench.compare(f"first token after {length}", [exactly(bench.prompt(length), 1)])


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


@scenario
def adapters(bench: Bench) -> None:
    """32 requests with four LoRA adapters (r = 8, all linear layers) beside the same requests without."""
    from peft import LoraConfig, get_peft_model

    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    requests = [exactly(bench.prompt(24, str(number)), 48) for number in range(32)]
    names = ["red", "green", "blue", "white"]
    with TemporaryDirectory() as folder:
        for name in names:
            config = LoraConfig(r=8, target_modules=linear, init_lora_weights=False)
            torch.manual_seed(names.index(name))
            get_peft_model(copy.deepcopy(bench.reference), config).save_pretrained(folder)
            bench.engine.load_adapter(name, folder)
    adapted = [replace(request, adapter=names[number % 4]) for number, request in enumerate(requests)]
    with_adapters, without = Clock(), Clock()
    for _ in range(bench.rounds + 1):
        with_adapters.measure(lambda: bench.run(adapted))
        without.measure(lambda: bench.run(requests))
    for name in names:
        bench.engine.unload_adapter(name)
    bench.report("four adapters side by side cost", with_adapters, without)


@scenario
def prefix(bench: Bench) -> None:
    """Time to first token of a second question over 2,000 tokens of context, beside that of the first."""
    firsts, seconds = [], []
    for number in range(bench.rounds):
        context = bench.prompt(2000, f"Document {number}.")
        for question, times in (("Who was it?", firsts), ("Where did they go?", seconds)):
            request = exactly((*context, *bench.engine.encode(question)), 1)
            times.append(bench.engine.submit(request).result().timings.first_token)
    ratio = statistics.median(second / first for first, second in zip(firsts, seconds, strict=True))
    print(f"first token over 2,000 tokens {min(firsts):.2f} s, follow-up {min(seconds):.3f} s; ratio {ratio:.3f}")


@scenario
def lookup(bench: Bench) -> None:
    """Answers that quote their documents, with guesses and without."""
    rules = [
        f"Rule {n}: a visitor of the {place} must wear {wear} and leave before {n + 3} in the afternoon."
        for n, (place, wear) in enumerate([("library", "soft shoes"), ("tower", "a helmet"), ("garden", "gloves")], 1)
    ]
    text = " ".join(rules)
    asked = [f"{text}\nRepeat the rules word by word.\n{text}\nRepeat again.\nRule {n}:" for n in (1, 2, 3)]
    requests = [exactly(tuple(bench.engine.encode(prompt)), 64) for prompt in asked]
    plain, guessed = Clock(), Clock()
    for _ in range(bench.rounds + 1):
        guessed.measure(lambda: [bench.run([request]) for request in requests])
        with without_guesses():
            plain.measure(lambda: [bench.run([request]) for request in requests])
    bench.report("answers that quote: without guesses over with", plain, guessed)


@scenario
def grounded(bench: Bench) -> None:
    """Questions about documents, with guesses and without: as retrieval_qa asks, in a few words, by quoting.

    Answers end where the model ends them. Measured is the answer, from its first token on, and with it the reading of
    the prompt, which guesses cannot make shorter.
    """
    bench.engine._eos_ids = bench.eos_ids
    for style, prompts in _questions(bench).items():
        requests = [Request(prompt, Sampling(max_new_tokens=64)) for prompt in prompts]
        bench.engine.batch.prefixes.clear()
        reading = sum(_measure(bench, request)[0] for request in requests)
        plain, guessed = [], []
        for _ in range(bench.rounds):
            guessed.append(sum(_measure(bench, request)[1] for request in requests))
            with without_guesses():
                plain.append(sum(_measure(bench, request)[1] for request in requests))
        answer = statistics.median(a / b for a, b in zip(plain, guessed, strict=True))
        whole = statistics.median((reading + a) / (reading + b) for a, b in zip(plain, guessed, strict=True))
        print(f"grounded, {style}: processor time without guesses over with {answer:.2f}, reading included {whole:.2f}")
    bench.engine._eos_ids = frozenset()


def _measure(bench: Bench, request: Request) -> tuple[float, float]:
    """Seconds of processor time to the first piece of an answer, and from there to its end."""
    begin = time.process_time()
    pieces = iter(bench.engine.submit(request))
    next(pieces)
    first = time.process_time()
    for _ in pieces:
        pass
    return first - begin, time.process_time() - first


QUESTIONS = 6
"""About articles of XQuAD, for each style; each with two paragraphs."""

HANDBOOK = {
    "Who founded the observatory and when?": "## 1. A short history",
    "How was the first real telescope paid for?": "## 1. A short history",
    "How is the mirror cleaned?": "### 2.1 The main telescope",
    "Which telescope do visitors use?": "### 2.2 The small telescopes",
}
"""Questions about examples/handbook.md, and the heading of the section that answers them."""


def _questions(bench: Bench) -> dict[str, list[tuple[int, ...]]]:
    """Prompts by style."""
    texts: dict[str, list[str]] = {"retrieval_qa on XQuAD": [], "in a few words": [], "by quoting": []}
    for article in json.loads(XQUAD.read_text("utf-8"))["data"][:QUESTIONS]:
        passages = [paragraph["context"] for paragraph in article["paragraphs"][:2]]
        question, context = article["paragraphs"][0]["qas"][0]["question"], "\n\n".join(passages)
        texts["retrieval_qa on XQuAD"].append(_retrieval_qa(question, passages))
        texts["in a few words"].append(f"{context}\n\n{question} Answer in a few words.")
        texts["by quoting"].append(
            f"{context}\n\n{question} Answer by quoting, word by word, what the text says of it."
        )
    handbook = (Path(__file__).parents[1] / "examples/handbook.md").read_text("utf-8")
    texts["retrieval_qa on the handbook"] = [
        _retrieval_qa(question, [f"{heading}{handbook.partition(heading)[2][:1500]}"])
        for question, heading in HANDBOOK.items()
    ]
    return {style: [_encode(bench, text) for text in each] for style, each in texts.items()}


def _retrieval_qa(question: str, passages: list[str]) -> str:
    """What the app sends."""
    from calpaca_retrieval_qa.excerpt import excerpt
    from calpaca_retrieval_qa.prompts import load_prompts

    found = {"context": "\n\n".join(passages), "excerpt": excerpt(question, passages), "question": question}
    return str(load_prompts("en").stuff.invoke(found).to_messages()[-1].content)


def _encode(bench: Bench, text: str) -> tuple[int, ...]:
    return tuple(bench.engine.encode(bench.engine.template.parts([{"role": "user", "content": text}])))


@scenario
def batch(bench: Bench) -> None:
    """`batch` of LangChain's language model on 32 prompts, beside the same requests given to the engine."""
    from calpaca import CalpacaLLM

    prompts = [f"{number}. {FILLER * (1 + number % 5)}" for number in range(32)]
    requests = [Request(prompt, Sampling(max_new_tokens=32)) for prompt in prompts]
    llm = CalpacaLLM.from_model(bench.model, Sampling(max_new_tokens=32))
    chained, plain = Clock(), Clock()
    for _ in range(bench.rounds + 1):
        plain.measure(lambda: bench.run(requests))
        bench.engine.batch.prefixes.clear()
        chained.measure(lambda: llm.batch(prompts))
    bench.report("llm.batch of 32: speed beside the engine's own batch", plain, chained)


@scenario
def latency(bench: Bench) -> None:
    """Time to first token (95 %) of short requests while 16 long answers are written, beside an idle engine."""

    def first_token(number: int) -> float:
        request = exactly(bench.prompt(20, f"Short {random.random()} {number}"), 1)
        return float(bench.engine.submit(request).result().timings.first_token)

    first_token(0)
    idle = sorted(first_token(number) for number in range(20))
    running = [bench.engine.submit(exactly(bench.prompt(40, str(number)), 2000)) for number in range(16)]
    while any(handle._chunks == [] for handle in running):
        time.sleep(0.05)
    loaded = sorted(first_token(number) for number in range(40))
    for handle in running:
        handle.cancel()
    print(
        f"first token of a short request: idle {idle[10]:.3f} s, beside 16 answers 95 % within {loaded[37]:.3f} s;"
        f" ratio {loaded[37] / idle[10]:.2f}, to the same share of idle ones {loaded[37] / idle[18]:.2f}"
    )


@contextmanager
def without_guesses() -> Iterator[None]:
    """Without prompt lookup, which the engine does by itself."""
    from calpaca.core.engines.lookup import PromptLookup

    draft = PromptLookup.draft
    PromptLookup.draft = lambda *_: []  # type: ignore[method-assign]
    try:
        yield
    finally:
        PromptLookup.draft = draft  # type: ignore[method-assign]


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
