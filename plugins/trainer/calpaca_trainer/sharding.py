"""How a model is shared out between processes: whole in each of them (DDP), by DeepSpeed's ZeRO, or by FSDP2."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calpaca.core.errors import UsageError
from calpaca_trainer.processes import Processes
from calpaca_trainer.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn


class Sharding:
    """Every process holds the whole model, or there is one process alone."""

    name = "DDP"
    collective = False
    """Whether a pass through the model needs all processes at once."""
    in_place = False
    """Whether `shard` does all of it, and nothing else is to wrap the model."""
    autocasts = True
    """Whether layers of two types can be computed together."""
    casts = False
    """Whether the whole model is cast to what is computed in, and not only what is frozen."""

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """What transformers' TrainingArguments must be told."""
        return {}

    def shard(self, model: nn.Module) -> None:
        """Share the model out, before its optimiser is made."""

    def check(self, wrapped: nn.Module) -> None:
        """Raise TrainingError unless the model is shared out as was asked."""

    @contextmanager
    def unsharded(self, model: nn.Module) -> Iterator[None]:
        """Make the model's parts usable by themselves, as for generating."""
        del model
        yield

    def weights(self, model: nn.Module, *, trained: bool) -> Mapping[str, Tensor] | None:
        """Whole tensors by name, of all parameters or of those that learn; all processes call it, the first gets them."""
        del trained
        weights: Mapping[str, Tensor] = model.state_dict()
        return weights

    def save_optimizer(self, model: nn.Module, optimizer: Any, file: Path) -> bool:
        """Write the optimiser's state; whether this did it, and not the Trainer."""
        del model, optimizer, file
        return False

    def load_optimizer(self, model: nn.Module, optimizer: Any, file: Path) -> bool:
        """Read it again."""
        del model, optimizer, file
        return False


def choose_sharding(recipe: Recipe, processes: Processes, dtype: str) -> Sharding:
    """What the recipe asks for. Raises UsageError or UnsupportedError where it cannot be had."""
    _say_what_deepspeed_computes_on()
    if not recipe.deepspeed and not recipe.fsdp:
        return Sharding()
    if processes.count == 1:
        flag = "--fsdp" if recipe.fsdp else "--deepspeed"
        raise UsageError(f"{flag} shares a model out, and there is one process.", "Add --processes 2, or use torchrun.")
    if recipe.fsdp:
        from calpaca_trainer.fsdp import FullySharded

        return FullySharded()
    from calpaca_trainer.zero import Zero
    from calpaca_trainer.zero_config import read_zero_config

    return Zero(read_zero_config(recipe, processes.count, dtype))


def _say_what_deepspeed_computes_on() -> None:
    """Accelerate imports DeepSpeed wherever it is installed, and DeepSpeed warns where it must guess."""
    from torch import cuda

    if not cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
