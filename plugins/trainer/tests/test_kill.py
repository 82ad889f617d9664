"""A run that is killed again and again ends as one that was never interrupted, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from calpaca.core.checkpoint.manifest import MANIFEST
from calpaca_trainer.metrics import read_metrics

KILLS = 6  # of one process; runs of several take longer and are killed once


def begin(small: Path, rows: Path, output: Path, steps: int, way: tuple[str, ...]) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "calpaca", "train", "sft", "--model", str(small), "--dataset", str(rows), "--max-length", "128",
        "--dtype", "float32", "--max-steps", str(steps), "--save-every", "3", "--batch-size", "2", "--accumulation", "2",
        "--dropout", "0.1", "--neftune", "5", "--eval-share", "0.1", "--eval-every", "10", "--samples", "1",
        "--output", str(output), *way,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)


def kill_when(process: subprocess.Popen[bytes], output: Path, step: int, chance: random.Random) -> bool:
    """Kill all of a run's processes, or one of several, soon after it has done `step`; whether it was still there."""
    while step not in {record["step"] for record in read_metrics(output)}:
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.2))
    several = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if len(several) == 2 and chance.random() < 0.5:
        os.kill(int(chance.choice(several)), signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() != 0


def curve(folder: Path) -> list[dict[str, Any]]:
    return [{name: record[name] for name in record if name != "seconds"} for record in read_metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "steps"),
    [
        pytest.param((), 40, id="alone"),
        pytest.param(("--processes", "2"), 10, id="ddp"),
        pytest.param(("--processes", "2", "--fsdp"), 10, id="fsdp"),
        pytest.param(
            ("--processes", "2", "--deepspeed", "zero2"), 10, id="zero2",
            marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
        ),
    ],
)  # fmt: skip
def test_killed_at_random_steps_the_loss_curve_goes_on_exactly(way, steps, small, rows, tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert begin(small, rows, whole, steps, way).wait() == 0
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for step in sorted(chance.sample(range(1, steps - 2), KILLS if not way else 1)):
        assert kill_when(begin(small, rows, killed, steps, way), killed, step, chance)
    assert not (killed / MANIFEST).exists()
    assert begin(small, rows, killed, steps, way).wait() == 0
    assert curve(killed) == curve(whole)
    assert (whole / "adapter_model.safetensors").read_bytes() == (killed / "adapter_model.safetensors").read_bytes()
