"""The processes of one run: torchrun starts several, each with a share of every step's rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from calpaca.core.errors import CalpacaError, UnsupportedError

T = TypeVar("T")

_LAUNCHERS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""Variables that `accelerate launch` sets; with them Accelerate would wrap the model, or on a CPU silently not."""


@dataclass(frozen=True)
class Processes:
    """This process's number, and how many there are."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def join(self) -> None:
        """Meet the others. Raises UnsupportedError where more than data is to be shared out."""
        for variable, name in _LAUNCHERS.items():
            if os.environ.get(variable, "").lower() in {"1", "true"}:
                raise UnsupportedError(
                    f"{name} is asked for ({variable}), which this version cannot do: it would train with DDP instead.",
                    "Start it with torchrun, without accelerate's configuration.",
                )
        if self.count > 1:
            from torch import distributed

            if not distributed.is_initialized():
                distributed.init_process_group("cpu:gloo,cuda:nccl" if _has_cuda() else "gloo")

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first process decides, in all of them; its error, too."""
        if self.count == 1:
            return decide()
        from torch import distributed

        said: list[tuple[T | None, CalpacaError | None]] = [(None, None)]
        if self.is_first:
            try:
                said = [(decide(), None)]
            except CalpacaError as error:
                said = [(None, error)]
        distributed.broadcast_object_list(said, src=0)
        answer, refusal = said[0]
        if refusal is not None:
            raise refusal
        return answer  # type: ignore[return-value]


def find_processes() -> Processes:
    """What torchrun says; one process without it."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
