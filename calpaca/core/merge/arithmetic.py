"""The arithmetic of merging, bit for bit that of `peft.merge_and_unload` (0.21), in about one extra tensor of memory.

W is a weight in the dtype of the base, A and B an adapter's factors in float32 (adapters in half precision are
widened first), s its scaling. Every formula is computed in float32 and rounded to W's dtype once, unless it says
otherwise. A weight in float32 is therefore not rounded at all, which is how several adapters are accumulated.

A low-rank product lies as [out, in]. Some weights lie the other way round, as [in, out]: those of the embeddings and
of GPT-2's linear layers (`fan_in_fan_out`). They are `transposed`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCK = 1 << 18
"""Elements that are added and rounded at a time, so that they stay in a processor's cache."""


class NotFinite(ArithmeticError):  # noqa: N818  # a value, not a fault of the program
    """A sum is NaN, or larger than the weight's dtype can hold."""


def scaling(config: Mapping[str, Any], module: str) -> float:
    """s = alpha / r, or alpha / √r with rank-stabilised LoRA (https://arxiv.org/abs/2312.03732).

    A pattern's value is taken where the end of the module's path matches it as a regular expression.
    """
    r = _of_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def rank(config: Mapping[str, Any], module: str) -> int:
    """r of a module."""
    return int(_of_pattern(config.get("rank_pattern"), module, config["r"]))


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    matching = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matching, default)


def low_rank(a: Tensor, b: Tensor, s: float, out: Tensor | None = None) -> Tensor:
    """ΔW = (B·A)·s as [out, in], from A [r, in] and B [out, r] (https://arxiv.org/abs/2106.09685)."""
    import torch

    return torch.mm(b, a, out=out).mul_(s)


def add(weight: Tensor, product: Tensor, *, transposed: bool = False) -> Tensor:
    """W ← round(W + ΔW), in place; `product` is used up. Raises NotFinite."""
    change = product.T if transposed else product
    for block in _blocks(weight.shape):
        weight[block] = _finite(change[block].add_(weight[block]), weight.dtype)
    return weight


def add_rounded(weight: Tensor, product: Tensor, *, transposed: bool) -> Tensor:
    """W ← round(W + round(ΔW)), in place, which is what PEFT does to embeddings. Raises NotFinite."""
    return add(weight, product.to(weight.dtype).to(product.dtype), transposed=transposed)


def add_scaled(weight: Tensor, product: Tensor, magnitude: Tensor, *, transposed: bool) -> Tensor:
    """W ← round(m / ‖W + ΔW‖ · (W + ΔW)), the norm over each output's inputs (DoRA, https://arxiv.org/abs/2402.09353).

    `magnitude` is m, [out]. W is the weight that the adapter is put on, with those before it merged already.
    """
    import torch

    # The layout is PEFT's, since the order of a sum, here that of the norm, decides its last bit.
    total = weight.T + product if transposed else _add_to(product, weight)
    total.mul_((magnitude / torch.linalg.norm(total, dim=1)).view(-1, 1))
    change = total.T if transposed else total
    for block in _blocks(weight.shape):
        weight[block] = _finite(change[block], weight.dtype)
    return weight


def replace_rows(weight: Tensor, rows: Tensor, indices: Sequence[int]) -> Tensor:
    """W[indices] ← round(rows), in place: tokens that were trained alone."""
    import torch

    return weight.index_copy_(0, torch.tensor(indices), rounded(rows, weight.dtype))


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in another dtype. Raises NotFinite."""
    return values if values.dtype == dtype else _finite(values, dtype).to(dtype)


def cast(chunks: Iterable[bytes | memoryview], source: torch.dtype, target: torch.dtype) -> Iterator[Tensor]:
    """The elements of a stream of bytes, rounded to another dtype, piece by piece. Raises NotFinite."""
    return (rounded(piece, target) for piece in elements(chunks, source))


def elements(chunks: Iterable[bytes | memoryview], dtype: torch.dtype) -> Iterator[Tensor]:
    """The elements of a stream of bytes, in pieces. Only what a chunk may not be used for, or cuts, is copied."""
    import torch

    left = b""
    for chunk in chunks:
        data = bytearray(left + chunk) if left or memoryview(chunk).readonly else chunk
        whole = len(data) - len(data) % dtype.itemsize
        left = bytes(data[whole:])
        if whole:
            yield torch.frombuffer(data, dtype=dtype, count=whole // dtype.itemsize)


def bounds(values: Tensor) -> tuple[float, float]:
    """The lowest and highest of some values; NaN if one of them is."""
    import torch

    low, high = torch.aminmax(values)
    return float(low), float(high)


def fits(low: float, high: float, dtype: torch.dtype) -> bool:
    """Whether a dtype can hold everything between two values."""
    import torch

    return -torch.finfo(dtype).max <= low <= high <= torch.finfo(dtype).max


def _add_to(product: Tensor, weight: Tensor) -> Tensor:
    """ΔW ← W + ΔW, in place, without widening all of W at once."""
    for block in _blocks(weight.shape):
        product[block].add_(weight[block])
    return product


def _blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Rows to work on at a time."""
    step = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, if all of them fit into a dtype."""
    if values.numel():
        low, high = bounds(values)
        if not fits(low, high, dtype):
            raise NotFinite(f"values from {low:g} to {high:g}")
    return values
