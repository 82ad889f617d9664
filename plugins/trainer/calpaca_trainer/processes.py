"""The processes of one run: each has a share of every step's rows."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from calpaca.core.errors import CalpacaError, UnsupportedError
from calpaca_trainer.errors import TrainingError

T = TypeVar("T")

_LAUNCHERS = {"ACCELERATE_USE_FSDP": ("FSDP", "--fsdp"), "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "--deepspeed")}
"""Variables that `accelerate launch` sets; with them Accelerate would wrap the model, or on a CPU silently not."""
_PATIENCE = timedelta(hours=6)  # the others wait while the first turns rows into tokens
_GONE = ("closed by peer", "Connection reset", "Broken pipe", "NCCL error")


@dataclass(frozen=True)
class Processes:
    """This process's number, and how many there are."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def join(self) -> None:
        """Meet the others. Raises UnsupportedError where `accelerate launch` asks for what it would not do."""
        for variable, (name, flag) in _LAUNCHERS.items():
            if os.environ.get(variable, "").lower() in {"1", "true"}:
                raise UnsupportedError(
                    f"{name} is asked for by accelerate's configuration ({variable}), which would train with DDP instead.",
                    f"Start it with torchrun and give {flag}.",
                )
        if not self.is_first:
            logging.getLogger("calpaca").setLevel(logging.ERROR)  # the first says it
        if self.count > 1:
            import torch

            has_cuda = torch.cuda.is_available()
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo", timeout=_PATIENCE)
                atexit.register(_leave)

    def place(self, device: str) -> str:
        """The device of this process: where there are several, each has a GPU of its own."""
        if self.count == 1 or device == "cpu":
            return device
        import torch

        if not torch.cuda.is_available():
            return device
        own = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(own)
        return f"cuda:{own}"

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first process decides, in all of them. Its error ends them all; it alone says why."""
        if self.count == 1:
            return decide()
        answer, refusal = self._hear_first(decide)
        if refusal is not None:
            raise refusal if self.is_first else SystemExit(refusal.exit_code)
        return answer  # type: ignore[return-value]

    def in_turn(self, act: Callable[[], T]) -> T:
        """What each does for itself, the first before the others, which then find what it put in the cache."""
        made: list[T] = []
        self.agree(lambda: made.append(act()))
        return made[0] if made else act()

    def together(self, act: Callable[[], T]) -> T:
        """What each does for itself, at once. When it fails in any of them all end, and the first of those says why."""
        if self.count == 1:
            return act()
        from torch import distributed

        made: list[T] = []
        failure: CalpacaError | None = None
        try:
            made.append(act())
        except CalpacaError as error:
            failure = error
        failures: list[CalpacaError | None] = [None] * self.count
        with self.noticing():
            distributed.all_gather_object(failures, failure)
        for rank, found in enumerate(failures):
            if found is not None:
                raise found if rank == self.rank else SystemExit(found.exit_code)
        return made[0]

    def _hear_first(self, decide: Callable[[], T]) -> tuple[T | None, CalpacaError | None]:
        from torch import distributed

        said: list[tuple[T | None, CalpacaError | None]] = [(None, None)]
        if self.is_first:
            try:
                said = [(decide(), None)]
            except CalpacaError as error:
                said = [(None, error)]
        with self.noticing():
            distributed.broadcast_object_list(said, src=0)
        return said[0]

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Say in words that another process is gone. Raises TrainingError for it."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not any(sign in str(error) for sign in _GONE):
                raise
            raise TrainingError(
                f"Process {self.rank} of {self.count} lost another process of the run.",
                "What ended that one stands above. The same command goes on after the last checkpoint.",
            ) from error


def _leave() -> None:
    """Left to the interpreter's end, gloo's threads may abort the process."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def find_processes() -> Processes:
    """What torchrun says; one process without it."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
