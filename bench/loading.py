"""Loading: `calpaca.runtime().model(folder)` beside `from_pretrained`, in one process and in turns.

Run: python bench/loading.py [--model smollm2-135m-instruct | --shape 1b] [--dtype float32] [--rounds 7]

Both load weights and tokenizer. `--shape` makes random bfloat16 weights of that shape, with the tokenizer of `--model`
(1b: 2.7 GB of disk, and twice that of memory in float32). calpaca also checks the files and hashes their contents: `new` is a folder
that was never hashed before (the digests are forgotten before each load), `known` one whose digests are remembered.
The last two rows go on to the first token after a prompt of 30: calpaca lays the weights out for generation before it,
`generate` runs on them as they are.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from merging import SHAPES, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import calpaca
from calpaca.core.engine import Request, Sampling
from calpaca.core.sources import resolve_model
from calpaca.core.spec import ModelSpec
from calpaca.core.weights import quiet_transformers


def load_with_transformers(folder: Path, dtype: str) -> tuple[Any, Any]:
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def load_known(folder: Path, dtype: str) -> object:
    """Load with calpaca, and wait for the fingerprint, which is computed beside loading."""
    runtime = calpaca.runtime()
    model = runtime.model(ModelSpec.model_validate({"model": str(folder), "device": "cpu", "dtype": dtype}))
    _ = model.fingerprint
    runtime.close()
    return model


def load_new(folder: Path, dtype: str) -> object:
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("CALPACA_CACHE")
        os.environ["CALPACA_CACHE"] = cache
        try:
            return load_known(folder, dtype)
        finally:
            os.environ.pop("CALPACA_CACHE") if before is None else os.environ.update(CALPACA_CACHE=before)


PROMPT = tuple(range(100, 130))


def first_token_of_transformers(folder: Path, dtype: str) -> object:
    model, _ = load_with_transformers(folder, dtype)
    with torch.inference_mode():
        return model.generate(torch.tensor([PROMPT]), max_new_tokens=1, do_sample=False)


def first_token(folder: Path, dtype: str) -> object:
    spec = {"model": str(folder), "engine": "transformers", "device": "cpu", "dtype": dtype}
    with calpaca.runtime() as runtime:
        model = runtime.model(ModelSpec.model_validate(spec))
        return model.engine.submit(Request(PROMPT, Sampling(1))).result(600)


WAYS: dict[str, Callable[[Path, str], object]] = {
    "from_pretrained": load_with_transformers,
    "calpaca, known": load_known,
    "calpaca, new": load_new,
    "generate, first token": first_token_of_transformers,
    "calpaca, first token": first_token,
}
BESIDE = {"calpaca, first token": "generate, first token"}  # all others: the first way


@contextmanager
def folder_of(model: str, shape: str | None) -> Iterator[Path]:
    """A model's folder, or one with random weights and its tokenizer."""
    found = resolve_model(model, calpaca.runtime(), format="hf").path
    if shape is None:
        yield found
        return
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / shape
        subprocess.run([sys.executable, __file__, "--make", shape, str(made)], check=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(found / name, made / name)
        yield made


def measure(folder: Path, dtype: str, rounds: int) -> dict[str, float]:
    """Median seconds of every way. The first round, which imports libraries, does not count."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way, load in WAYS.items():
            begin = time.perf_counter()
            load(folder, dtype)
            if number:
                times[way].append(time.perf_counter() - begin)
    return {way: statistics.median(seconds) for way, seconds in times.items()}


def main() -> None:
    if sys.argv[1:2] == ["--make"]:  # in a process of its own, whose memory is given back
        folder = Path(sys.argv[3])
        make_base(folder, SHAPES[sys.argv[2]] | {"vocab_size": 49_152}, folder.with_name("jobs.sqlite"))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of the model's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with folder_of(options.model, options.shape) as folder:
        medians = measure(folder, options.dtype, options.rounds)
    for way, median in medians.items():
        reference = BESIDE.get(way, "from_pretrained")
        print(f"{way:22} {median:6.2f} s  {median / medians[reference]:.2f} x {reference}")


if __name__ == "__main__":
    main()
