"""Other places that a run is reported to: TensorBoard, Weights & Biases, MLflow, through transformers' own callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calpaca.core.errors import UsageError, unknown_name

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
_FOLDER = "tensorboard"


def check_reporters(names: Sequence[str]) -> None:
    """Raise UsageError for one that is unknown or not installed."""
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    for name in names:
        if name not in _PACKAGES:
            raise UsageError(*unknown_name("reporter", name, _PACKAGES))
        if name not in installed:
            raise UsageError(
                f"--report-to is {name}, which is not installed.", f"Install it with: pip install {_PACKAGES[name]}"
            )


def tensorboard(names: Sequence[str], folder: Path) -> list[Any]:
    """TensorBoard's callback, writing into the run folder: by itself it chooses a place by date and host."""
    if "tensorboard" not in names:
        return []
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(folder / _FOLDER)
    return [callback]


def others(names: Sequence[str]) -> list[str] | str:
    """What transformers starts by itself."""
    return [name for name in names if name != "tensorboard"] or "none"
