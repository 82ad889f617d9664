"""Cross-entropy on the tokens that are learnt, and on no others.

The output layer is by far the widest of a small model. It is applied to the hidden states that predict a learnt token
only, some at a time, and the gradient is computed in the same pass, so no matrix of all logits ever exists.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from calpaca_trainer.collator import IGNORED

_TINY = torch.finfo(torch.float32).tiny
_ROWS = 128  # hidden states that the output layer is applied to at a time
_SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Fields of configurations whose models change the logits after the output layer."""


class _CrossEntropy(torch.autograd.Function):
    """Sum of −log softmax(h·Wᵀ)[target], with h [n, d], W [v, d], targets [n]; logits and softmax in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros((), dtype=torch.float32)
        matrix = weight.to(_compute_dtype(hidden, weight))
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for at in range(0, len(hidden), _ROWS):
            rows, wanted = hidden[at : at + _ROWS].to(matrix.dtype), targets[at : at + _ROWS]
            chances = torch.softmax(rows @ matrix.T, dim=1, dtype=torch.float32)
            total -= chances.gather(1, wanted[:, None]).clamp_min_(_TINY).log_().sum()
            if not (wants_hidden or wants_weight):
                continue
            chances.scatter_add_(1, wanted[:, None], chances.new_full((len(wanted), 1), -1))
            slope = chances.to(matrix.dtype)  # softmax − one-hot
            if to_hidden is not None:
                to_hidden[at : at + _ROWS] = slope @ matrix
            if to_weight is not None:
                to_weight += slope.T @ rows
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        to_hidden, to_weight = ctx.saved_tensors
        return (
            to_hidden * slope.to(to_hidden.dtype) if to_hidden is not None else None,
            (to_weight * slope).to(ctx.dtype) if to_weight is not None else None,
            None,
        )


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def sum_of_losses(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """The losses of `targets` [n] after hidden states [n, d], summed. `head` is a linear layer, or one with an adapter."""
    if isinstance(head, nn.Linear) and head.bias is None:
        total: Tensor = _CrossEntropy.apply(hidden, head.weight, targets)
        return total
    parts = zip(torch.split(hidden, _ROWS), torch.split(targets, _ROWS), strict=True)
    losses = [nn.functional.cross_entropy(head(rows).float(), wanted, reduction="sum") for rows, wanted in parts]
    return torch.stack(losses).sum() if losses else hidden.sum() * 0


def attach_loss(model: Any) -> None:
    """Let a causal language model compute this loss when it is called with labels.

    Whatever wraps it (PEFT, DDP, DeepSpeed) calls it as before. Models that change logits after the output layer keep
    their own loss.
    """
    if any(getattr(model.config, name, None) is not None for name in _SCALED_LOGITS):
        return
    original = model.forward

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> Any:
        if labels is None:
            return original(input_ids=input_ids, position_ids=position_ids, **options)
        backbone = getattr(self, self.base_model_prefix)
        hidden = backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        total = sum_of_losses(hidden[:, :-1][wanted], _active(self.get_output_embeddings()), targets[wanted])
        count = wanted.sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count)

    model.forward = MethodType(forward, model)


def _active(head: Any) -> nn.Module:
    """The output layer, or the copy of it that PEFT trains whole."""
    copies = getattr(head, "modules_to_save", None)
    module: nn.Module = copies[head.active_adapters[0]] if copies is not None else head
    return module
