"""Frozen linear layers with LoRA adapters, computed together with what stands in front of them.

For autograd a layer of PEFT is eight operations, each of which keeps what it read, partly in float32. Here layers with
the same input are one operation: y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ. It keeps what goes in, and the narrow x·Aᵀ; x itself (a norm
of the hidden states, or the product of gate and up) is computed once more when gradients are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from calpaca_trainer.elementwise import Elementwise


class Preparation(Protocol):
    """What makes the linear layers' input."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """x"""
        ...

    def backward(self, slope: Tensor, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x again, and the gradients of the inputs where `slope` is that of x."""
        ...


class AsIs:
    """x is the input."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0]

    def backward(self, slope: Tensor, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return inputs[0], (slope,)


@dataclass(frozen=True)
class Normed:
    """x is the input's root-mean-square norm."""

    weight: Tensor
    epsilon: float
    elementwise: Elementwise

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.elementwise.rms_norm(inputs[0], self.weight, self.epsilon)

    def backward(self, slope: Tensor, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        result, to_input = self.elementwise.rms_norm_gradient(slope, inputs[0], self.weight, self.epsilon)
        return result, (to_input,)


@dataclass(frozen=True)
class Gated:
    """x is silu(first input) · second input."""

    elementwise: Elementwise

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.elementwise.gated(*inputs)

    def backward(self, slope: Tensor, *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        result, *slopes = self.elementwise.gated_gradient(slope, *inputs)
        return result, tuple(slopes)


@dataclass(frozen=True)
class Frozen:
    """What does not learn in a linear layer; `scale` is that of its adapter."""

    weight: Tensor
    bias: Tensor | None
    scale: float


def project(layers: Sequence[nn.Module], preparation: Preparation, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What the layers give, each [..., out], on x [..., in]; they must be such as `fits` allows."""
    frozen, factors = [], list[Tensor | None]()
    for layer in layers:
        base, scale = layer, 0.0
        if isinstance(layer, LoraLinear):
            base = layer.base_layer
        if isinstance(layer, LoraLinear) and not layer.disable_adapters:  # as for the reference of DPO
            (name,) = layer.active_adapters
            scale = layer.scaling[name]
            factors += (layer.lora_A[name].weight, layer.lora_B[name].weight)
        else:
            factors += (None, None)
        frozen.append(Frozen(base.weight, base.bias, scale))  # type: ignore[arg-type]
    outputs: tuple[Tensor, ...] = _Projections.apply(  # type: ignore[no-untyped-call]
        preparation, frozen, len(inputs), *inputs, *factors
    )
    return outputs


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, preparation: Preparation, frozen: Sequence[Frozen], count: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        dtype = frozen[0].weight.dtype
        inputs = [each.detach() for each in tensors[:count] if each is not None]
        factors = [None if each is None else each.to(dtype) for each in tensors[count:]]
        prepared = preparation.forward(*inputs)
        rows = prepared.reshape(-1, prepared.shape[-1]).to(dtype)
        outputs, narrow = [], list[Tensor | None]()
        for layer, a, b in zip(frozen, factors[::2], factors[1::2], strict=True):
            output = nn.functional.linear(rows, layer.weight, layer.bias)
            low = None if a is None else rows @ a.T
            if low is not None:
                output.addmm_(low, b.T, alpha=layer.scale)  # type: ignore[union-attr]
            narrow.append(low)
            outputs.append(output.view(*prepared.shape[:-1], -1))
        ctx.preparation, ctx.frozen, ctx.count = preparation, frozen, count
        ctx.save_for_backward(*inputs, *factors, *narrow)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        count, layers = ctx.count, len(ctx.frozen)
        saved = ctx.saved_tensors
        inputs, factors, narrow = saved[:count], saved[count : count + 2 * layers], saved[count + 2 * layers :]
        rows = [slope.reshape(-1, slope.shape[-1]) for slope in slopes]
        to_lows = [
            None if b is None else (slope @ b).mul_(layer.scale)
            for layer, slope, b in zip(ctx.frozen, rows, factors[1::2], strict=True)
        ]
        to_inputs: Sequence[Tensor | None] = [None] * count
        if any(ctx.needs_input_grad[3 : 3 + count]):
            slope = _to_rows(ctx.frozen, rows, to_lows, factors[::2]).view(*slopes[0].shape[:-1], -1)
            prepared, to_inputs = ctx.preparation.backward(slope, *inputs)
        else:
            prepared = ctx.preparation.forward(*inputs)
        prepared = prepared.reshape(-1, prepared.shape[-1]).to(rows[0].dtype)
        to_factors = list[Tensor | None]()
        for layer, slope, low, to_low in zip(ctx.frozen, rows, narrow, to_lows, strict=True):
            if low is None or to_low is None:
                to_factors += (None, None)
            else:
                to_factors += ((to_low.T @ prepared).float(), (slope.T @ low).float().mul_(layer.scale))
        return (None, None, None, *to_inputs, *to_factors)


def _to_rows(
    frozen: Sequence[Frozen], slopes: Sequence[Tensor], lows: Sequence[Tensor | None], downs: Sequence[Tensor | None]
) -> Tensor:
    """The gradient of x [n, in]: what each layer's W and A give of the layer's own."""
    total: Tensor | None = None
    for layer, slope, low, a in zip(frozen, slopes, lows, downs, strict=True):
        total = slope @ layer.weight if total is None else total.addmm_(slope, layer.weight)
        if low is not None and a is not None:
            total.addmm_(low, a)
    assert total is not None
    return total


def fits(layer: Any) -> bool:
    """Whether a layer can be computed here: a frozen plain one, or such a one with one plain LoRA adapter."""
    if type(layer) is LoraLinear:
        if not _is_plain(layer):
            return False
        layer = layer.base_layer
    return type(layer) is nn.Linear and not any(each.requires_grad for each in layer.parameters())


def _is_plain(layer: Any) -> bool:
    """Whether a layer has one adapter that is nothing but A, B and a scale."""
    names = layer.active_adapters
    if len(names) != 1 or layer.lora_variant or layer.merged or layer.fan_in_fan_out or layer.lora_bias[names[0]]:
        return False
    return isinstance(layer.lora_dropout[names[0]], nn.Identity)
