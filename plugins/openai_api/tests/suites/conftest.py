"""One `calpaca serve` for all outside suites: a process of its own, with real weights in float32."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MODEL = "smollm2-135m-instruct"
ADAPTER = "llama-notes"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is run by `make check-api`."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("suite")


@dataclass(frozen=True)
class Target:
    """The server that the suites ask. `adapter` is the folder of its model id `llama-notes`."""

    url: str
    model: str
    weights: Path
    adapter: Path

    @property
    def names(self) -> dict[str, str]:
        """The model ids of both."""
        return {"base": self.model, "adapter": ADAPTER}


@pytest.fixture(scope="session")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter whose random factors change every answer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def target(smollm2: Path, e5: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    command = [sys.executable, "-m", "calpaca", "serve", "--model", MODEL, "--adapter", f"{ADAPTER}={adapter}"]
    command += ["--engine", "transformers", "--dtype", "float32", "--device", "cpu", "--temperature", "0"]
    command += ["--port", "0", "--strict"]
    folder = tmp_path_factory.mktemp("suites")
    places: dict[str, Any] = {"CALPACA_DATA": folder / "data", "CALPACA_CONFIG": folder / "config"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=folder, env=os.environ | {k: str(v) for k, v in places.items()}
    )
    assert process.stderr is not None
    try:
        address = next((line.split()[-1] for line in process.stderr if line.startswith("Serving")), None)
        assert address is not None, "the server did not start"
        drain = threading.Thread(target=process.stderr.read, daemon=True)  # a full pipe would stop the server
        drain.start()
        yield Target(address, MODEL, smollm2, adapter)
        assert process.poll() is None, "the server ended under the suites"
    finally:
        process.terminate()
        process.wait(60)
        process.stderr.close()
