"""A run that is killed again and again ends as one that was never interrupted, bit for bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calpaca_trainer.metrics import read_metrics


def begin(small: Path, rows: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "calpaca", "train", "sft", "--model", str(small), "--dataset", str(rows), "--max-length", "128",
        "--dtype", "float32", "--max-steps", "40", "--save-every", "3", "--batch-size", "2", "--accumulation", "2",
        "--dropout", "0.1", "--neftune", "5", "--eval-share", "0.1", "--eval-every", "10", "--samples", "1", "--output", str(output),
    ]  # fmt: skip
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_random_moments_the_loss_curve_goes_on_exactly(small, rows, tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    assert begin(small, rows, whole).wait() == 0
    longest = time.monotonic() - started
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    chance, kills = random.Random(seed), 0
    while not (killed / "calpaca-manifest.json").is_file():
        process = begin(small, rows, killed)
        try:
            assert process.wait(timeout=chance.uniform(0.25, 0.6) * longest if kills < 6 else None) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    print(f"{kills} kills")
    curves = [
        [
            {name: record[name] for name in record if name not in {"seconds", "tokens"}}
            for record in read_metrics(folder)
        ]
        for folder in (whole, killed)
    ]
    assert curves[0] == curves[1]
    assert (whole / "adapter_model.safetensors").read_bytes() == (killed / "adapter_model.safetensors").read_bytes()
