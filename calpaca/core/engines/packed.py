"""Linear layers in oneDNN's own layout: nearly twice as fast at the batch sizes of generation on x86 processors.

The operators are torch's own but private, so they are tried out first; where they are missing or wrong, nothing changes.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class PackedLinear(nn.Module):
    """A linear layer that holds its weight in oneDNN's layout only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, inputs: Tensor) -> Tensor:
        """[…, in_features] → […, out_features]"""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")
        return output

    def add_to(self, output: Tensor, inputs: Tensor) -> Tensor:
        """`output` and the layer's own, added while they are still in the registers."""
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, output, self._packed, self.bias, "add")
        return total


def pack(layer: Any) -> Any:
    """The layer packed, if that is possible and it is a plain one, or such a one inside of PEFT's; else the layer
    itself."""
    if type(getattr(layer, "base_layer", None)) is nn.Linear and not getattr(layer, "lora_variant", True):
        layer.base_layer = pack(layer.base_layer)
    if type(layer) is not nn.Linear or layer.weight.device.type != "cpu":
        return layer
    return PackedLinear(layer) if can_pack(layer.weight.dtype) else layer


LEAST_ROWS = 4
"""Rows from which on a product reads a packed weight at full speed: with one row 14 GB/s, with four 18 (float32, one
thread of an AVX-512 processor that reads 23)."""


def least_rows(weight: Tensor) -> int:
    """How many rows a product with weights like this should have at least, empty ones included."""
    return LEAST_ROWS if weight.device.type == "cpu" and can_pack(weight.dtype) else 1


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed layers of this dtype work here, by trying one."""
    if platform.machine().lower() not in {"x86_64", "amd64"} or dtype not in {torch.float32, torch.bfloat16}:
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    linear = nn.Linear(64, 48, dtype=dtype)
    inputs = torch.linspace(-1, 1, 3 * 64, dtype=dtype).view(3, 64)
    try:
        packed, expected = PackedLinear(linear), linear(inputs)
        tolerance = 1e-5 if dtype.itemsize == 4 else 2e-2
        once, twice = packed(inputs), packed.add_to(expected, inputs)
        return torch.allclose(once, expected, atol=tolerance) and torch.allclose(
            twice, 2 * expected, atol=2 * tolerance
        )
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


class Joined(nn.Module):
    """Layers with the same input, their outputs side by side."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([layer(inputs) for layer in self.layers], dim=-1)


class Scratch:
    """Memory for joining matrices, the same for one layer after the other: to ask for fresh memory costs more than the
    copying."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        """[out, in] of all weights, below each other; valid until the next call."""
        first, rows = weights[0], sum(len(weight) for weight in weights)
        size = rows * first.shape[1]
        if self._memory is None or self._memory.dtype != first.dtype or self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=first.dtype)
        joined = self._memory[:size].view(rows, -1)
        return torch.cat([weight.detach() for weight in weights], out=joined)


def join(layers: Sequence[Any], scratch: Scratch) -> Any:
    """Layers with the same input as one: a single matrix where all are plain, else one after the other."""
    if any(type(layer) is not nn.Linear for layer in layers) or len({layer.bias is None for layer in layers}) > 1:
        return Joined([pack(layer) for layer in layers])
    biases = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    weights = [layer.weight for layer in layers]
    packs = weights[0].device.type == "cpu" and can_pack(weights[0].dtype)
    return linear(scratch.join(weights) if packs else torch.cat(weights), biases)


def linear(weight: Tensor, bias: Tensor | None = None) -> Any:
    """A layer with this weight [out, in], packed where that is possible."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return pack(layer)
