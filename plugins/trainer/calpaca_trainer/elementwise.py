"""What a LLaMA layer computes beside its matrix products: norm, gate and rotation, and their gradients.

Each function reads and writes its matrices as seldom as PyTorch's operators allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Pair = tuple[Tensor, Tensor]


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`hidden` […, d], divided by the root of its mean square and scaled by `weight` [d]; computed in float32."""
    return (hidden * _inverse_size(hidden, epsilon)).to(weight.dtype).mul_(weight)


def rms_norm_gradient(slope: Tensor, hidden: Tensor, weight: Tensor, epsilon: float) -> Pair:
    """The norm's result again, and the gradient of `hidden` where `slope` is that of the result."""
    inverse = _inverse_size(hidden, epsilon)
    normed = hidden * inverse
    result = normed.to(weight.dtype) * weight
    inner = slope * weight.float()
    along = torch.linalg.vecdot(inner, normed).unsqueeze(-1) / hidden.shape[-1]
    return result, inner.addcmul_(normed, along, value=-1).mul_(inverse).to(hidden.dtype)


def _inverse_size(hidden: Tensor, epsilon: float) -> Tensor:
    size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(size.square() / hidden.shape[-1] + epsilon)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up"""
    return functional.silu(gate).mul_(up)


def gated_gradient(slope: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) · up again, and the gradients of `gate` and `up`."""
    active = functional.silu(gate)
    to_gate: Tensor = torch.ops.aten.silu_backward(slope * up, gate)
    return active * up, to_gate, active.mul_(slope)


def rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`heads` [batch, length, n, d] turned by their positions' angles [batch or 1, length, 1, d]."""
    half = heads.shape[-1] // 2
    turned = heads * cosine
    turned[..., :half].addcmul_(heads[..., half:], sine[..., :half], value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sine[..., half:])
    return turned


@dataclass(frozen=True)
class Elementwise:
    """Norm and gate, as they are or compiled; the rotation is faster as it is."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rms_norm_gradient: Callable[[Tensor, Tensor, Tensor, float], Pair] = rms_norm_gradient
    gated: Callable[[Tensor, Tensor], Tensor] = gated
    gated_gradient: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = gated_gradient


def compiled() -> Elementwise:
    """Compiled, once for all batch sizes and lengths."""
    functions: list[Any] = [rms_norm, rms_norm_gradient, gated, gated_gradient]
    return Elementwise(*(torch.compile(each, dynamic=True) for each in functions))
