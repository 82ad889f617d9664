"""FSDP2: every parameter, its gradient and its optimiser state lie in parts, one in each process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from calpaca_trainer.errors import TrainingError
from calpaca_trainer.sharding import Sharding

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class FullySharded(Sharding):
    """Each layer is put together while it computes; what lies outside the layers is, during a whole pass.

    torch's own `fully_shard`, and not Accelerate's way to it: that one trains with DDP on a CPU without a word.
    """

    name = "FSDP2"
    collective = in_place = True

    def identity(self) -> dict[str, Any]:
        return {"sharding": self.name}

    def shard(self, model: nn.Module) -> None:
        if isinstance(model, FSDPModule):
            return
        mesh = init_device_mesh(next(model.parameters()).device.type, (distributed.get_world_size(),))
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def check(self, wrapped: nn.Module) -> None:
        whole = [name for name, parameter in wrapped.named_parameters() if not isinstance(parameter, DTensor)]
        if whole or not isinstance(wrapped, FSDPModule):
            raise TrainingError(
                f"FSDP2 was asked for, but {len(whole)} parameters are not shared out ({', '.join(whole[:2])}).",
                "Leave --fsdp out, or try --deepspeed zero3.",
            )

    @contextmanager
    def unsharded(self, model: nn.Module) -> Iterator[None]:
        assert isinstance(model, FSDPModule)
        model.unshard()
        yield
        model.reshard()

    def weights(self, model: nn.Module, *, trained: bool) -> Mapping[str, Tensor] | None:
        first, weights = distributed.get_rank() == 0, {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or not trained:
                assert isinstance(parameter, DTensor)
                whole = parameter.full_tensor().detach()
                if first:
                    weights[name] = whole.cpu()
        return weights if first else None

    def save_optimizer(self, model: nn.Module, optimizer: Any, file: Path) -> bool:
        state = get_optimizer_state_dict(model, optimizer.optimizer, options=_WHOLE)
        if distributed.get_rank() == 0:
            torch.save(state, file)
        return True

    def load_optimizer(self, model: nn.Module, optimizer: Any, file: Path) -> bool:
        state = torch.load(file, map_location="cpu", weights_only=True)
        set_optimizer_state_dict(model, optimizer.optimizer, state, options=_WHOLE)
        return True


def _layers(model: nn.Module) -> list[nn.Module]:
    """A model's layers, also under an adapter."""
    lists = (
        each for name, each in model.named_modules() if name.endswith(".layers") and isinstance(each, nn.ModuleList)
    )
    return list(next(lists, ()))
