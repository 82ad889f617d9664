"""Loading: `calpaca.runtime().model(folder)` beside `from_pretrained`, in one process and in turns.

Run: python bench/loading.py [--model smollm2-135m-instruct] [--rounds 7]

Both load weights and tokenizer in float32. calpaca also checks the files and hashes their contents: `new` is a folder
that was never hashed before (the digests are forgotten before each load), `known` one whose digests are remembered.
The last two rows go on to the first token after a prompt of 30: calpaca lays the weights out for generation before it,
`generate` runs on them as they are.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import calpaca
from calpaca.core.engine import Request, Sampling
from calpaca.core.sources import resolve_model
from calpaca.core.spec import ModelSpec
from calpaca.core.weights import quiet_transformers


def load_with_transformers(folder: Path) -> tuple[Any, Any]:
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def load_known(folder: Path) -> object:
    """Load with calpaca, and wait for the fingerprint, which is computed beside loading."""
    runtime = calpaca.runtime()
    model = runtime.model(ModelSpec(model=str(folder), device="cpu", dtype="float32"))
    _ = model.fingerprint
    runtime.close()
    return model


def load_new(folder: Path) -> object:
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("CALPACA_CACHE")
        os.environ["CALPACA_CACHE"] = cache
        try:
            return load_known(folder)
        finally:
            os.environ.pop("CALPACA_CACHE") if before is None else os.environ.update(CALPACA_CACHE=before)


PROMPT = tuple(range(100, 130))


def first_token_of_transformers(folder: Path) -> object:
    model, _ = load_with_transformers(folder)
    with torch.inference_mode():
        return model.generate(torch.tensor([PROMPT]), max_new_tokens=1, do_sample=False)


def first_token(folder: Path) -> object:
    with calpaca.runtime() as runtime:
        model = runtime.model(ModelSpec(model=str(folder), engine="transformers", device="cpu", dtype="float32"))
        return model.engine.submit(Request(PROMPT, Sampling(1))).result(600)


WAYS: dict[str, Callable[[Path], object]] = {
    "from_pretrained": load_with_transformers,
    "calpaca, known": load_known,
    "calpaca, new": load_new,
    "generate, first token": first_token_of_transformers,
    "calpaca, first token": first_token,
}
BESIDE = {"calpaca, first token": "generate, first token"}  # all others: the first way


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    folder = resolve_model(options.model, calpaca.runtime(), format="hf").path
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(options.rounds + 1):
        for way, load in WAYS.items():
            begin = time.perf_counter()
            load(folder)
            if number:  # the first round imports libraries
                times[way].append(time.perf_counter() - begin)
    medians = {way: statistics.median(seconds) for way, seconds in times.items()}
    for way, median in medians.items():
        reference = BESIDE.get(way, "from_pretrained")
        print(f"{way:22} {median:6.2f} s  {median / medians[reference]:.2f} x {reference}")


if __name__ == "__main__":
    main()
