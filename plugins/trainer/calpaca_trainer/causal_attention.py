"""Causal attention on a CPU as matrix products, forwards and backwards.

PyTorch's fused kernel computes small blocks one after the other, and its backward pass takes three times as long as
the same numbers in batched products do (L = 256, bfloat16: 25 ms against 8). Queries are taken some at a time with the
keys that they see, so that memory grows with the length and not with its square; nothing but the heads is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_ROWS = 128  # queries at a time: half of the products with keys that they do not see are saved from 512 tokens on


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · q·kᵀ)·v, each query over the keys up to its own place.

    Queries and result are [batch, length, heads, d]; keys and values [batch, length, groups, d], each for
    heads / groups queries. Scores are rounded to the heads' dtype, as in transformers' eager attention; the softmax
    itself is in float32.
    """
    result: Tensor = _CausalAttention.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return result


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        keys, values, result = _by_group(key), _by_group(value), torch.empty_like(query)
        for rows in _blocks(query.shape[1]):
            weights = _weights(_together(query, rows, key.shape[2]) * scale, keys[:, : rows.stop], rows)
            _apart(result, rows, key.shape[2]).copy_((weights @ values[:, : rows.stop]).view(_shape(query, rows, key)))
        return result

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        keys, values = _by_group(key), _by_group(value)
        to_query, to_keys, to_values = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
        for rows in _blocks(query.shape[1]):
            seen = slice(0, rows.stop)
            queries = _together(query, rows, key.shape[2]) * ctx.scale
            slopes = _together(slope, rows, key.shape[2])
            weights = _weights(queries, keys[:, seen], rows)
            to_values[:, seen].baddbmm_(weights.mT, slopes)
            to_weights = slopes @ values[:, seen].mT
            to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            to_keys[:, seen].baddbmm_(to_scores.mT, queries)
            part = torch.bmm(to_scores, keys[:, seen]).mul_(ctx.scale)
            _apart(to_query, rows, key.shape[2]).copy_(part.view(_shape(query, rows, key)))
        return to_query, _by_place(to_keys, key), _by_place(to_values, value), None


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, length)) for start in range(0, length, _ROWS))


def _weights(queries: Tensor, keys: Tensor, rows: slice) -> Tensor:
    """[batch · groups, heads / groups · rows, seen]"""
    scores = torch.bmm(queries, keys.mT)
    count = rows.stop - rows.start
    unseen = torch.full((count, count), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    scores.view(len(scores), -1, count, rows.stop)[..., rows] += unseen
    return torch.softmax(scores, dim=-1)


def _by_group(heads: Tensor) -> Tensor:
    """[batch, length, groups, d] → [batch · groups, length, d]"""
    return heads.transpose(1, 2).flatten(0, 1)


def _by_place(heads: Tensor, like: Tensor) -> Tensor:
    """The reverse."""
    batch, length, groups, d = like.shape
    return heads.view(batch, groups, length, d).transpose(1, 2)


def _apart(heads: Tensor, rows: slice, groups: int) -> Tensor:
    """A view of some rows: [batch, groups, heads / groups, rows, d]"""
    batch, _, count, d = heads.shape
    return heads[:, rows].view(batch, -1, groups, count // groups, d).permute(0, 2, 3, 1, 4)


def _together(heads: Tensor, rows: slice, groups: int) -> Tensor:
    """The rows of all heads that share keys below each other: [batch · groups, heads / groups · rows, d]"""
    return _apart(heads, rows, groups).flatten(2, 3).flatten(0, 1)


def _shape(query: Tensor, rows: slice, key: Tensor) -> tuple[int, ...]:
    batch, _, heads, d = query.shape
    return batch, key.shape[2], heads // key.shape[2], rows.stop - rows.start, d
