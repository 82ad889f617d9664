"""Converting: `calpaca models convert` from Hugging Face's form to `.pth` and back, beside `cp` + sha256 of the model.

Run: python bench/converting.py [--size 3] [--parts 2] [--rounds 2] [--folder DIR]

Makes a model of random bfloat16 weights, `--size` GB of layers of a 7B model, then runs each way in a process of its
own, in turns, and deletes what it made. Needs three times the size on the disk. Prints wall time and peak resident
memory (`ru_maxrss`) of every run, the medians, and their ratios; fails when what comes back is not what went in.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from merging import SHAPES, copy_and_hash, make_base

EMBEDDINGS, LAYER = 0.524, 0.405  # GB of a 7B model
COPY, TO_PTH, TO_HF = "cp + sha256", "HF -> .pth", ".pth -> HF"


def convert(source: Path, output: Path, *options: str) -> None:
    from calpaca.cli.main import main

    assert main(["models", "convert", str(source), "--output", str(output), *options]) == 0


def child(way: str, source: Path, output: Path, parts: str) -> None:
    """Run a way; prints its seconds and the peak of this process and its children in megabytes."""
    begin = time.perf_counter()
    if way == COPY:
        copy_and_hash(source, source, output)
    else:
        convert(source, output, *["--to", "pth", "--parts", parts] * (way == TO_PTH))
    seconds = time.perf_counter() - begin
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e3
    print(f"{seconds:.2f} {peak:.0f}")


def run(way: str, source: Path, output: Path, parts: int) -> tuple[str, float, float]:
    arguments = [sys.executable, __file__, "--child", way, str(source), str(output), str(parts)]
    told = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seconds, peak = map(float, told.stdout.split()[-2:])
    print(f"{way:12} {seconds:7.1f} s  {peak:7.0f} MB", flush=True)
    return way, seconds, peak


def one_round(folder: Path, parts: int) -> Iterator[tuple[str, float, float]]:
    base, copy, pth, back = (folder / name for name in ("base", "copy", "pth", "back"))
    yield run(COPY, base, copy, parts)
    shutil.rmtree(copy)
    yield run(TO_PTH, base, pth, parts)
    yield run(TO_HF, pth, back, parts)
    check_same(base, back)
    shutil.rmtree(pth)
    shutil.rmtree(back)


def check_same(first: Path, second: Path) -> None:
    from calpaca.core.checkpoint.manifest import read_manifest

    manifests = read_manifest(first), read_manifest(second)
    assert manifests[0] is not None and manifests[1] is not None
    assert manifests[0].weights == manifests[1].weights, "other weights came back"


def make(folder: Path, size: float) -> None:
    layers = max(1, round((size - EMBEDDINGS) / LAYER))
    make_base(folder / "base", SHAPES["7b"] | {"num_hidden_layers": layers}, folder / "jobs.sqlite")
    print(
        f"{sum(file.stat().st_size for file in (folder / 'base').iterdir()) / 1e9:.1f} GB, {layers} layers", flush=True
    )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
        return
    if sys.argv[1:2] == ["--make"]:  # in a process of its own: a process inherits its parent's peak of memory
        make(Path(sys.argv[2]), float(sys.argv[3]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=float, default=3, help="GB of weights")
    parser.add_argument("--parts", type=int, default=2, help="number of .pth files")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where there is room")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        os.environ |= {"CALPACA_DATA": f"{temporary}/data", "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, __file__, "--make", temporary, str(options.size)], check=True)
        results = [each for _ in range(options.rounds) for each in one_round(Path(temporary), options.parts)]
    copied = statistics.median(seconds for way, seconds, _ in results if way == COPY)
    for way in (COPY, TO_PTH, TO_HF):
        median = statistics.median(seconds for each, seconds, _ in results if each == way)
        peak = max(peak for each, _, peak in results if each == way)
        print(f"median   {way:12} {median:7.1f} s  {peak:7.0f} MB at most  {median / copied:.2f} x (cp + sha256)")


if __name__ == "__main__":
    main()
