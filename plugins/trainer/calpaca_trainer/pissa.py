"""PiSSA: adapters that begin as the principal part of a weight (https://arxiv.org/abs/2404.02948).

The paper takes that part, B0·A0, out of the base and trains a copy of it. Here the base stays as it is: the adapter has
twice the rank, B = [B1 | −B0] and A = [A1 ; A0], of which the second half is frozen. W + s·B·A is the same function, and
what is saved is an ordinary adapter for the unchanged base, at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_OVERSAMPLING, _ITERATIONS = 8, 8  # of the randomised decomposition


def initialise(model: Any, rank: int) -> None:
    """Give all low-rank layers their first values, and freeze the second half of each. Ranks are already doubled."""
    import torch
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if not isinstance(module, LoraLayer) or not module.lora_A:
            continue
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        with torch.no_grad():
            weight = module.get_base_layer().weight.float()
            a0, b0 = _principal(weight, rank, module.scaling["default"])
            a.copy_(torch.cat([a0, a0], dim=0))
            b.copy_(torch.cat([b0, -b0], dim=1))
        a.register_hook(lambda slope: _masked(slope, rank, dimension=0))
        b.register_hook(lambda slope: _masked(slope, rank, dimension=1))


def _principal(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 [rank, in] and B0 [out, rank] with s·B0·A0 the best approximation of W of this rank."""
    import torch

    size = min(rank + _OVERSAMPLING, *weight.shape)
    u, s, v = torch.svd_lowrank(weight, q=size, niter=_ITERATIONS)
    root = torch.sqrt(s[:rank] / scaling)
    return root[:, None] * v[:, :rank].T, u[:, :rank] * root


def _masked(slope: Tensor, rank: int, *, dimension: int) -> Tensor:
    """The gradient with zeros for the frozen half."""
    frozen = slope.clone()
    frozen.narrow(dimension, rank, slope.shape[dimension] - rank).zero_()
    return frozen
