"""A LLaMA layer that learns by LoRA in as few operations as it takes, keeping little for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, eager_attention_forward

from calpaca_trainer.causal_attention import attend
from calpaca_trainer.elementwise import Elementwise, rotated
from calpaca_trainer.projection import AsIs, Gated, Normed, fits, project


class FusedLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """The layer of transformers with the same parts and parameters, computed otherwise while no cache is kept."""

    elementwise: Elementwise

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> Tensor:
        """[batch, length, hidden] → the same; `position_embeddings` are cosine and sine, [batch or 1, length, d]."""
        if past_key_values is not None:
            result: Tensor = super().forward(
                hidden_states, attention_mask=attention_mask, past_key_values=past_key_values,
                position_embeddings=position_embeddings, **options,
            )  # fmt: skip
            return result
        hidden_states = hidden_states + self._attend(hidden_states, attention_mask, position_embeddings, options)
        return hidden_states + self._feed_forward(hidden_states)

    def _attend(self, hidden: Tensor, mask: Tensor | None, positions: tuple[Tensor, Tensor], options: Any) -> Tensor:
        attention, cosine, sine = self.self_attn, *(each.unsqueeze(2) for each in positions)
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        query, key, value = (each.view(shape) for each in project(layers, self._normed(self.input_layernorm), hidden))
        query, key = (_rotated(each, cosine, sine) for each in (query, key))
        if mask is None and hidden.device.type == "cpu":
            seen = attend(query, key, value, attention.scaling)
        else:
            seen = _attend_as_configured(attention, (query, key, value), mask, options)
        return project([attention.o_proj], AsIs(), seen.reshape(*hidden.shape[:-1], -1))[0]

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        mlp = self.mlp
        wide = project((mlp.gate_proj, mlp.up_proj), self._normed(self.post_attention_layernorm), hidden)
        return project([mlp.down_proj], Gated(self.elementwise), *wide)[0]

    def _normed(self, norm: Any) -> Normed:
        return Normed(norm.weight, norm.variance_epsilon, self.elementwise)


def _attend_as_configured(attention: Any, heads: Sequence[Tensor], mask: Tensor | None, options: Any) -> Tensor:
    """By the implementation that the model was loaded with."""
    find = ALL_ATTENTION_FUNCTIONS.get_interface
    implementation = find(attention.config._attn_implementation, eager_attention_forward)
    query, key, value = (each.transpose(1, 2) for each in heads)
    result: Tensor
    result, _ = implementation(attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling, **options)
    return result


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    result: Tensor = _Rotation.apply(heads, cosine, sine)  # type: ignore[no-untyped-call]
    return result


class _Rotation(torch.autograd.Function):
    """Heads [batch, length, n, d] turned by their positions; the gradient is turned back, so no heads are kept."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:  # type: ignore[override]
        ctx.angles = cosine, sine
        return rotated(heads, cosine, sine)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cosine, sine = ctx.angles
        return rotated(slope, cosine, -sine), None, None


def fuse(causal: Any, elementwise: Elementwise) -> bool:
    """Let the layers of a model be computed so, if all of them can be; whether they are."""
    layers = getattr(getattr(causal, causal.base_model_prefix), "layers", ())
    if not layers or not all(map(_fits, layers)):
        return False
    for layer in layers:
        layer.__class__ = FusedLayer  # same parts, same parameters; only `forward` differs
        layer.elementwise = elementwise
    return True


def _fits(layer: Any) -> bool:
    """Whether a layer is LLaMA's own and learns by plain LoRA adapters alone."""
    if type(layer) is not LlamaDecoderLayer or layer.mlp.config.hidden_act != "silu":
        return False
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    frozen = all(type(norm) is LlamaRMSNorm and not norm.weight.requires_grad for norm in norms)
    linear = [*layer.self_attn.children(), *(each for each in layer.mlp.children() if each is not layer.mlp.act_fn)]
    return frozen and not layer.self_attn.attention_dropout and all(map(fits, linear))
