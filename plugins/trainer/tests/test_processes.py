"""Several processes: the same losses as one on the same rows, and what is refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from calpaca.core.errors import UnsupportedError
from calpaca_trainer.metrics import read_metrics
from calpaca_trainer.training import prepare, train


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(small, rows, tmp_path) -> None:
    def losses(name: str, *launcher: str, accumulation: int) -> list[float]:
        output = tmp_path / name
        command = [
            sys.executable, *launcher, "-m", "calpaca", "train", "sft", "--model", str(small), "--dataset", str(rows),
            "--max-length", "128", "--dtype", "float32", "--max-steps", "5", "--batch-size", "2", "--accumulation", str(accumulation),
            "--eval-share", "0.2", "--save-every", "2", "--samples", "1", "--output", str(output),
        ]  # fmt: skip
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        assert (output / "adapter_model.safetensors").is_file()
        records = read_metrics(Path(output))
        return [record.get("loss", record.get("eval_loss")) for record in records]

    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master-port", str(free_port()))
    alone = losses("alone", accumulation=2)
    assert losses("together", *torchrun, accumulation=1) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_would_silently_be_something_else_is_refused(variable, recipe, runtime, tmp_path, monkeypatch) -> None:
    it = prepare(recipe(), "sft", runtime)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UnsupportedError, match="would train with DDP instead"):
        train(it, tmp_path / "run", runtime, {})
    assert not (tmp_path / "run").exists()
