"""A disk that is full half-way, for real: a file system of a few hundred kilobytes, mounted in a name space of its own.

The numbers of the weights fit, but not what goes around them (headers, configuration, manifest), so the command begins
and then fails. With more room the same command ends.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")

from safetensors.torch import save_file  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from calpaca.core.checkpoint.manifest import MANIFEST  # noqa: E402
from calpaca.core.checkpoint.plan import ModelPlan  # noqa: E402
from calpaca.core.checkpoint.verify import verify  # noqa: E402
from calpaca.core.convert.conversion import Target, plan_conversion  # noqa: E402
from calpaca.core.export.gguf_export import GgufOptions, plan_gguf  # noqa: E402
from calpaca.core.files import AdapterFiles, ModelFiles  # noqa: E402
from calpaca.core.merge import plan_merge  # noqa: E402
from calpaca.core.spec import ModelSpec  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("unshare") is None, reason="there is no unshare(1) here to mount a small disk with"
    ),
]

_MORE = 200_000  # bytes: too little for a vocabulary of SmolLM2's size
IN_A_NAME_SPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
WORK = """
mount -t tmpfs -o size=$SIZE none "$DISK" || exit 99
"$@" 2> first.txt; echo $? > first.code
find "$DISK" -type f -printf '%P\\n' > left.txt
mount -o remount,size=64m "$DISK" && "$@" 2> second.txt; echo $? > second.code
cp -r "$DISK/out" kept
"""


@pytest.fixture
def model(tmp_path: Path, smollm2: Path) -> Path:
    """A small LLaMA with SmolLM2's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    modules = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    tensors = {f"{module}.lora_{factor}.weight": torch.full((16, 16), 0.1) for module in modules for factor in "AB"}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "adapter"


def files_of(model: Path, *adapters: Path) -> ModelFiles:
    chosen = tuple(AdapterFiles(adapter.name, adapter) for adapter in adapters)
    return ModelFiles(model.name, ModelSpec(model=str(model)), model, chosen, model, None)


def merging(model: Path, adapter: Path) -> tuple[list[str], ModelPlan]:
    return ["merge", "model", "--adapter", "adapter"], plan_merge(files_of(model, adapter), None).model


def converting(model: Path, _adapter: Path) -> tuple[list[str], ModelPlan]:
    plan = plan_conversion(model, Target(form="pth")).plan
    assert plan is not None
    return ["convert", "model", "--to", "pth"], plan


def exporting(model: Path, _adapter: Path) -> tuple[list[str], ModelPlan]:
    return ["export", "model", "--type", "f16", "--no-logits"], plan_gguf(files_of(model), GgufOptions("f16")).model


@dataclass(frozen=True)
class Ended:
    """How a command ended, what it said, and the files on the disk then."""

    code: int
    said: str
    left: list[str]


def run_on_a_small_disk(folder: Path, size: int, *arguments: str) -> tuple[Ended, Ended]:
    """Run a command twice: on a disk of so many bytes, and once there is room. What it wrote is left in `kept`."""
    disk = folder / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "calpaca", "models", *arguments, "--output", str(disk / "out")]
    ended = subprocess.run(
        [*IN_A_NAME_SPACE, WORK, "sh", *command], cwd=folder, env={**os.environ, "SIZE": str(size), "DISK": str(disk)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not (folder / "first.code").is_file():
        pytest.skip(f"no file system can be mounted here: {ended.stderr.strip()}")
    left = (folder / "left.txt").read_text().splitlines()
    return tuple(
        Ended(int((folder / f"{run}.code").read_text()), (folder / f"{run}.txt").read_text(), left)
        for run in ("first", "second")
    )  # type: ignore[return-value]


@pytest.mark.parametrize("command", [merging, converting, exporting], ids=["merge", "convert", "export"])
def test_a_disk_that_is_full_half_way(
    tmp_path: Path, model: Path, adapter: Path, command: Callable[[Path, Path], tuple[list[str], ModelPlan]]
) -> None:
    arguments, plan = command(model, adapter)
    full, done = run_on_a_small_disk(tmp_path, plan.size + _MORE, *arguments)
    assert full.code == 3, full.said
    told = re.search(r"The disk of (\S+) is full; out needs ([\d.,]+) MB in all", full.said)
    assert told is not None, full.said
    assert told[1].endswith(".out.partial")
    assert told[2] == f"{plan.size / 1e6:,.1f}"
    assert "--output" in full.said
    assert "Traceback" not in full.said
    assert all(".out.partial/" in name for name in full.left)
    assert not [name for name in full.left if name.endswith(MANIFEST)]
    assert done.code == 0, done.said
    assert verify(tmp_path / "kept").passed


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, model: Path, adapter: Path
) -> None:
    arguments, plan = merging(model, adapter)
    refused, _ = run_on_a_small_disk(tmp_path, plan.size // 2, *arguments)
    assert refused.code == 3
    needed, free = (f"{size / 1e6:,.1f} MB" for size in (plan.size, plan.size // 2))
    assert re.search(f"The merged model needs {needed} in .*, but {free} are free", refused.said), refused.said
    assert refused.left == []
