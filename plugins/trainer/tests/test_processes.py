"""Several processes: the losses and the adapter of one process on the same rows, and what is refused.

DeepSpeed is installed for the slow tests only (`make test-slow`); without it those of DeepSpeed are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

from calpaca.core.checkpoint.manifest import MANIFEST
from calpaca.core.errors import UnsupportedError, UsageError
from calpaca_trainer.errors import TrainingError
from calpaca_trainer.fsdp import FullySharded
from calpaca_trainer.launch import _free_port, must_launch
from calpaca_trainer.metrics import read_metrics
from calpaca_trainer.training import prepare
from calpaca_trainer.zero import Zero

OPTIONS = Path(__file__).parents[3].parent / "shared/data/ds_zero2_no_offload.json"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")

slow = pytest.mark.slow
with_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def start(*arguments: object, launcher: tuple[str, ...] = (), code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "calpaca", "train", "sft", *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done


def options(model: Path, rows: Path, output: Path, accumulation: int = 1) -> list[object]:
    return [
        "--model", model, "--dataset", rows, "--max-length", 128, "--dtype", "float32", "--max-steps", 3, "--batch-size", 2,
        "--accumulation", accumulation, "--eval-share", 0.2, "--save-every", 2, "--samples", 1, "--output", output,
    ]  # fmt: skip


def curve(folder: Path) -> list[float]:
    return [record.get("loss", record.get("eval_loss")) for record in read_metrics(folder)]


@pytest.fixture(scope="module")
def alone(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows, and the folder of a run of one process over them."""
    folder = tmp_path_factory.mktemp("alone")
    rows = folder / "rows.jsonl"
    texts = ({"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n + 1)))} for n in range(3, 27))
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    start(*options(small, rows, folder / "run", accumulation=2))
    return rows, folder / "run"


@slow
@pytest.mark.parametrize(
    "way",
    [
        pytest.param([], id="ddp"),
        pytest.param(["--fsdp"], id="fsdp"),
        pytest.param(["--deepspeed", "zero2"], id="zero2", marks=with_deepspeed),
        pytest.param(["--deepspeed", "zero3"], id="zero3", marks=with_deepspeed),
        pytest.param(["--deepspeed", OPTIONS], id="own-json", marks=with_deepspeed),
    ],
)
def test_two_processes_have_the_losses_and_the_adapter_of_one(way, alone, small, tmp_path) -> None:
    if OPTIONS in way and not OPTIONS.is_file():
        pytest.skip(f"{OPTIONS.name} is not there")
    rows, expected = alone
    output = tmp_path / "together"
    done = start(*options(small, rows, output), "--processes", 2, *way)
    assert done.stdout == f"{output}\n"
    assert curve(output) == pytest.approx(curve(expected), rel=1e-5)
    adapter, other = load_file(output / "adapter_model.safetensors"), load_file(expected / "adapter_model.safetensors")
    assert adapter.keys() == other.keys()
    assert all(adapter[name].allclose(other[name], atol=1e-5) for name in other)
    check_folder(output)


def check_folder(output: Path) -> None:
    """What two processes write is there once, and whole."""
    steps = [record["step"] for record in read_metrics(output) if "loss" in record]
    assert steps == [1, 2, 3]
    (sample,) = json.loads((output / "record/samples.json").read_text())
    assert sample["before"]
    assert sample["after"]
    summary = json.loads((output / "record/summary.json").read_text())
    assert summary["processes"].startswith("2, ")
    tensors = json.loads((output / MANIFEST).read_text())["tensors"]
    assert len(tensors) == len(load_file(output / "adapter_model.safetensors"))


@slow
def test_torchrun_as_it_is_typed(small, rows, tmp_path) -> None:
    launcher = (*TORCHRUN, str(_free_port()))
    done = start(*options(small, rows, tmp_path / "run"), launcher=launcher)
    assert done.stdout == f"{tmp_path / 'run'}\n"
    check_folder(tmp_path / "run")
    assert {file.name for file in (tmp_path / "run/checkpoint-2").glob("rng_state*")} == {
        "rng_state_0.pth", "rng_state_1.pth",
    }  # fmt: skip


@slow
def test_what_is_wrong_is_said_once(small, rows, tmp_path) -> None:
    rows.write_text("{}\n", "utf-8")
    failed = start(*options(small, rows, tmp_path / "run"), "--processes", 2, code=1)
    assert failed.stderr.count("calpaca: ") == 1
    assert not (tmp_path / "run").exists()


# What is asked for and cannot be had --------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_would_silently_be_something_else_is_refused(variable, recipe, runtime, monkeypatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UnsupportedError, match="would train with DDP instead"):
        prepare(recipe(), "sft", runtime)


@pytest.mark.parametrize("way", [{"fsdp": True}, {"deepspeed": "zero2"}], ids=["fsdp", "deepspeed"])
def test_one_process_alone_shares_nothing_out(way, recipe, runtime) -> None:
    with pytest.raises(UsageError, match="there is one process") as caught:
        prepare(recipe(**way), "sft", runtime)
    assert "--processes 2" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fsdp": True, "deepspeed": "zero2"}, "two ways of the same"),
        ({"fsdp": True, "compile": True}, "go with neither"),
        ({"deepspeed": "zero3", "quantization": "4bit"}, "go with neither"),
    ],
    ids=["both", "compile", "quantization"],
)
def test_ways_that_do_not_go_together_are_refused(changes, told, recipe) -> None:
    with pytest.raises(UsageError, match=told):
        recipe(**changes)


@pytest.mark.parametrize(
    "sharding", [FullySharded(), Zero({"zero_optimization": {"stage": 2}})], ids=lambda it: it.name
)
def test_a_model_that_is_whole_everywhere_is_no_shared_one(sharding) -> None:
    with pytest.raises(TrainingError, match="was asked for, but"):
        sharding.check(nn.Linear(2, 2))


def test_another_number_of_processes_than_torchrun_s_is_refused(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert must_launch(2)
    assert not must_launch(1)
    assert not must_launch(None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not must_launch(4)
    with pytest.raises(UsageError, match="--processes is 2, and torchrun started 4"):
        must_launch(2)


ZERO = {"stage": 2}


@slow
@with_deepspeed
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no JSON"),
        ({}, "has no section zero_optimization"),
        ({"zero_optimization": ZERO, "gradient_cliping": 1.0}, "'gradient_cliping', which DeepSpeed does not know"),
        ({"zero_optimization": {"stage": 2, "overlap": True}}, "overlap: Extra inputs"),
        ({"zero_optimization": {"stage": 7}}, "stage: Input should be"),
        ({"zero_optimization": {"stage": 0}}, "shares nothing out"),
        ({"zero_optimization": ZERO, "train_batch_size": 64}, "sets train_batch_size to 64, and the recipe to 4"),
        ({"zero_optimization": ZERO, "gradient_clipping": 0.5}, "sets gradient_clipping to 0.5, and the recipe to 1.0"),
        ({"zero_optimization": ZERO, "fp16": {"enabled": True}}, "asks for fp16"),
        ({"zero_optimization": ZERO, "bf16": {"enabled": True}}, "asks for bf16, and --dtype is float32"),
        ({"zero_optimization": ZERO, "scheduler": {"type": "WarmupLR"}}, "has a scheduler of its own"),
    ],
    ids=["json", "section", "name", "option", "stage", "nothing", "batch", "clipping", "fp16", "bf16", "scheduler"],
)
def test_wrong_options_of_deepspeed_are_told_before_anything_is_loaded(content: Any, told, recipe, tmp_path) -> None:
    from calpaca_trainer.zero_config import read_zero_config

    file = tmp_path / "options.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    with pytest.raises((UsageError, UnsupportedError), match=told):
        read_zero_config(recipe(deepspeed=str(file)), 2, "float32")


@slow
@with_deepspeed
def test_options_of_deepspeed_that_agree_are_taken(recipe, tmp_path) -> None:
    from calpaca_trainer.zero_config import read_zero_config

    file = tmp_path / "options.json"
    config = {"zero_optimization": {"stage": 3}, "train_batch_size": 4, "gradient_clipping": "auto"}
    file.write_text(json.dumps(config), "utf-8")
    assert read_zero_config(recipe(deepspeed=str(file)), 2, "float32") == config
