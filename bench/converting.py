"""Converting: `calpaca models convert` from Hugging Face's form to `.pth` and back, beside `cp` + sha256 of the model.

Run: python bench/converting.py [--size 3] [--parts 1] [--rounds 2] [--known] [--folder DIR]

Makes a model of random bfloat16 weights, `--size` GB of layers of a 7B model (13.5 is a whole one), then runs each way in
a process of its own, in turns, and deletes what it made. Needs twice the size on the disk. calpaca also hashes what it
reads, unless it wrote those files itself or hashed them before: that is forgotten before each run, or kept with
`--known`. Prints wall time, processor time and peak resident memory (`ru_maxrss`) of every run, the medians, and their
ratios; fails when what comes back is not what went in.
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
from dataclasses import dataclass
from pathlib import Path

from merging import SHAPES, copy_and_hash, make_base

EMBEDDINGS, LAYER = 0.524, 0.405  # GB of a 7B model
COPY, TO_PTH, TO_HF = "cp + sha256", "HF -> .pth", ".pth -> HF"


@dataclass(frozen=True)
class Result:
    """Wall time and processor time in seconds, peak memory in megabytes."""

    way: str
    seconds: float
    processor: float
    peak: float


def convert(source: Path, output: Path, *options: str) -> None:
    from calpaca.cli.main import main

    assert main(["models", "convert", str(source), "--output", str(output), *options]) == 0


def child(way: str, source: Path, output: Path, parts: str) -> None:
    """Run a way; prints its seconds, those of processors, and the peak of this process and its children in megabytes."""
    begin = time.perf_counter()
    if way == COPY:
        copy_and_hash(source, source, output)
    else:
        convert(source, output, *["--to", "pth", "--parts", parts] * (way == TO_PTH))
    seconds = time.perf_counter() - begin
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(each.ru_utime + each.ru_stime for each in used)
    print(f"{seconds:.2f} {processor:.2f} {max(each.ru_maxrss for each in used) / 1e3:.0f}")


def run(way: str, source: Path, output: Path, parts: int, known: bool) -> Result:
    if not known:
        Path(os.environ["CALPACA_CACHE"], "fingerprints.sqlite").unlink(missing_ok=True)
    arguments = [sys.executable, __file__, "--child", way, str(source), str(output), str(parts)]
    told = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    result = Result(way, *map(float, told.stdout.split()[-3:]))
    print(
        f"{way:12} {result.seconds:7.1f} s  {result.processor:7.1f} s of processors  {result.peak:7.0f} MB", flush=True
    )
    return result


def one_round(folder: Path, parts: int, known: bool) -> Iterator[Result]:
    """There and back; what comes back is the base of the next round, so that no more than two models lie there."""
    base, copy, pth = (folder / name for name in ("base", "copy", "pth"))
    yield run(COPY, base, copy, parts, known)
    shutil.rmtree(copy)
    yield run(TO_PTH, base, pth, parts, known)
    before = weights_of(base)
    shutil.rmtree(base)
    yield run(TO_HF, pth, base, parts, known)
    assert weights_of(base) == before, "other weights came back"
    shutil.rmtree(pth)


def weights_of(folder: Path) -> str:
    from calpaca.core.checkpoint.manifest import read_manifest

    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.weights


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
    parser.add_argument("--parts", type=int, default=1, help="number of .pth files")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--known", action="store_true", help="keep the digests of files that were hashed or written")
    parser.add_argument("--folder", type=Path, help="where there is room")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        os.environ |= {
            "CALPACA_DATA": f"{temporary}/data",
            "CALPACA_CACHE": f"{temporary}/cache",
            "HF_HUB_OFFLINE": "1",
        }
        subprocess.run([sys.executable, __file__, "--make", temporary, str(options.size)], check=True)
        rounds = (one_round(Path(temporary), options.parts, options.known) for _ in range(options.rounds))
        results = [result for each in rounds for result in each]
    copied = statistics.median(result.seconds for result in results if result.way == COPY)
    for way in (COPY, TO_PTH, TO_HF):
        median = statistics.median(result.seconds for result in results if result.way == way)
        peak = max(result.peak for result in results if result.way == way)
        print(f"median   {way:12} {median:7.1f} s  {peak:7.0f} MB at most  {median / copied:.2f} x (cp + sha256)")


if __name__ == "__main__":
    main()
