"""The forward pass over a step: a short one of our own for Llama-like models, transformers' own for all others."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from calpaca.core.engines.slots import Place
from calpaca.core.engines.step import Span, Step

if TYPE_CHECKING:
    from torch import Tensor

    from calpaca.core.engines.packed import Scratch

OWN = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""Model types whose forward pass is written here, and the class that has no other parts."""

ATTENTION = "calpaca"
"""The name under which transformers' models find our attention."""


@dataclass(frozen=True)
class Part:
    """Where a linear layer of the model is now: the outputs from `begin` to `end`, of `width`, of an attribute."""

    holder: Any
    attribute: str
    begin: int
    end: int
    width: int


class Decoder(Protocol):
    """Runs the tokens of a step; logits [outputs, vocabulary].

    `slots` says whether keys and values lie in the slots, so that tokens can be taken back or come from elsewhere.
    """

    slots: bool

    def __call__(self, step: Step) -> Tensor: ...

    def prepare(self) -> bool:
        """Pack the next of the weights, which must be done before the first step; False when none is left."""
        ...

    def part(self, module: str) -> Part | None:
        """A linear layer by its name in the model; None where there is none of that name that can be changed."""
        ...


def choose_decoder(model: Any) -> Decoder:
    """The fastest decoder for a loaded model."""
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    config = causal.config
    spread = len(set(getattr(causal, "hf_device_map", {}).values())) > 1
    if spread or not _keeps_keys_and_values(causal):
        return SerialDecoder(causal)
    windowed = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    plain = OWN.get(config.model_type) == type(causal).__name__ and config.hidden_act == "silu"
    if plain and not windowed and getattr(config, "sliding_window", None) is None:
        return LlamaDecoder(causal)
    return HubDecoder(causal)


def _keeps_keys_and_values(causal: Any) -> bool:
    """Whether every layer has ordinary attention, over all tokens or a window, that can be replaced by ours."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config = causal.config.get_text_config()
    layers = DynamicCache(config=config).layers
    return (
        causal._supports_attention_backend
        and causal._supports_sdpa
        and getattr(config, "attn_logit_softcapping", None) is None
        and all(type(layer) in {DynamicLayer, DynamicSlidingWindowLayer} for layer in layers)
    )


@dataclass
class _Layer:
    """A layer's parts, matrices with the same input joined. It can run before it is packed, only slower."""

    attention_norm: Any
    qkv: Any
    output: Any
    mlp_norm: Any
    gate_up: Any
    down: Any

    def pack(self, scratch: Scratch) -> None:
        """Lay the matrices out for this machine, and let go of them as they were."""
        from calpaca.core.engines.packed import join, pack

        self.qkv, self.gate_up = join(self.qkv.layers, scratch), join(self.gate_up.layers, scratch)
        self.output, self.down = pack(self.output), pack(self.down)


_JOINED = {
    "q_proj": ("qkv", 0), "k_proj": ("qkv", 1), "v_proj": ("qkv", 2), "o_proj": ("output", 0),
    "gate_proj": ("gate_up", 0), "up_proj": ("gate_up", 1), "down_proj": ("down", 0),
}  # fmt: skip
"""Where the model's linear layers are in a `_Layer`."""


class LlamaDecoder:
    """Llama, Mistral and Qwen2: RMSNorm, rotary positions, grouped attention, SwiGLU.

    Takes the model's weights over: their layers are repacked for this machine, so the model itself runs no more.
    """

    slots = True

    def __init__(self, causal: Any) -> None:
        from calpaca.core.engines.packed import Scratch

        config = causal.config
        self._head_size: int = causal.model.layers[0].self_attn.head_dim
        self._sizes = [heads * self._head_size for heads in _heads(config)]
        self._mlp_size: int = config.intermediate_size
        self._hidden_size: int = config.hidden_size
        self._embed, self._rotary, self._norm = causal.model.embed_tokens, causal.model.rotary_emb, causal.model.norm
        self._head, causal.lm_head = causal.lm_head, None
        self._layers = [_take_layer(layer) for layer in causal.model.layers]
        scratch = Scratch()  # goes with the last of what is to be packed
        self._unpacked: deque[Callable[[], None]] = deque(
            [self._pack_head, *(partial(layer.pack, scratch) for layer in self._layers)]
        )

    def prepare(self) -> bool:
        return _do_next(self._unpacked)

    def _pack_head(self) -> None:
        from calpaca.core.engines.packed import pack

        self._head = pack(self._head)

    def __call__(self, step: Step) -> Tensor:
        hidden = self._embed(step.ids)
        angles = self._angles(hidden, step.positions)
        for index, layer in enumerate(self._layers):
            queries, keys, values = self._project(layer, hidden, angles)
            hidden = hidden + layer.output(step.attend(index, queries, keys, values).flatten(1))
            hidden = hidden + self._mlp(layer, layer.mlp_norm(hidden))
        logits: Tensor = self._head(self._norm(hidden[step.outputs]))
        return logits

    def part(self, module: str) -> Part | None:
        found = re.fullmatch(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)", module)
        if found is None or found[2] not in _JOINED:
            return None
        attribute, place = _JOINED[found[2]]
        sizes = {"qkv": self._sizes, "gate_up": [self._mlp_size] * 2}.get(attribute, [self._hidden_size])
        begin = sum(sizes[:place])
        return Part(self._layers[int(found[1])], attribute, begin, begin + sizes[place], sum(sizes))

    def _angles(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tokens, 1, head size]; the first half of the sines is negated, see `_rotate`."""
        import torch

        cos, sin = self._rotary(hidden[None], positions[None])
        half = self._head_size // 2
        return cos.transpose(0, 1), torch.cat((-sin[..., :half], sin[..., half:]), dim=-1).transpose(0, 1)

    def _project(self, layer: _Layer, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [tokens, heads, head size], in their positions."""
        queries, keys, values = (
            part.view(len(part), -1, self._head_size)
            for part in layer.qkv(layer.attention_norm(hidden)).split(self._sizes, dim=-1)
        )
        return _rotate(queries, *angles), _rotate(keys, *angles), values

    def _mlp(self, layer: _Layer, hidden: Tensor) -> Tensor:
        import torch

        gate, up = layer.gate_up(hidden).split(self._mlp_size, dim=-1)
        output: Tensor = layer.down(torch.nn.functional.silu(gate) * up)
        return output


def _heads(config: Any) -> tuple[int, int, int]:
    """How many heads queries, keys and values have."""
    return config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads


def _take_layer(layer: Any) -> _Layer:
    """Take a layer's matrices out of the model, so that they are not there twice once they are packed."""
    from calpaca.core.engines.packed import Joined

    attention, mlp = layer.self_attn, layer.mlp
    taken = _Layer(
        layer.input_layernorm,
        Joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        attention.o_proj,
        layer.post_attention_layernorm,
        Joined([mlp.gate_proj, mlp.up_proj]),
        mlp.down_proj,
    )
    layer.self_attn = layer.mlp = None
    return taken


def _do_next(left: deque[Callable[[], None]]) -> bool:
    """Do the first thing that is left; False when nothing is. What fails is not tried again: it only makes faster."""
    if left:
        left.popleft()()
        return True
    return False


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for [tokens, heads, head size]: each number with the one half a head away, as Llama pairs them."""
    import torch

    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, dims=-1), sin)


_running = threading.local()


class HubDecoder:
    """Any model of transformers that lets its attention be replaced."""

    slots = True

    def __init__(self, causal: Any) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, _attend)
        causal.set_attn_implementation(ATTENTION)
        self._causal = causal
        self._unpacked: deque[Callable[[], None]] = deque(
            partial(_pack_children, module) for module in causal.modules()
        )

    def prepare(self) -> bool:
        return _do_next(self._unpacked)

    def part(self, module: str) -> Part | None:
        return _own_part(self._causal, module)

    def __call__(self, step: Step) -> Tensor:
        _running.step = step
        try:
            logits: Tensor = self._causal(
                input_ids=step.ids[None],
                position_ids=step.positions[None],
                use_cache=False,
                logits_to_keep=step.outputs,
            ).logits[0]
        finally:
            del _running.step
        return logits


def _pack_children(module: Any) -> None:
    from calpaca.core.engines.packed import pack

    for name, child in list(module.named_children()):
        if not name.startswith("lora_"):
            setattr(module, name, pack(child))


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,  # a mask: the step knows who sees whom
    scaling: float | None = None,
    sliding_window: int | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, tokens, dimensions] in, [1, tokens, heads, dimensions] out."""
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    attended = _running.step.attend(
        module.layer_idx, queries.contiguous(), keys, values, scale=scaling, window=sliding_window
    )
    return attended[None], None


def _own_part(causal: Any, module: str) -> Part | None:
    """A linear layer that is where the model put it; not the output layer, which sees only some tokens of a step."""
    try:
        size = causal.get_submodule(module).out_features
    except AttributeError:
        return None
    path, _, name = module.rpartition(".")
    return Part(causal.get_submodule(path), name, 0, size, size) if path else None


class SerialDecoder:
    """Any other model, and any that is spread over several devices: each row has a cache of transformers' own and runs
    by itself."""

    slots = False

    def __init__(self, causal: Any) -> None:
        self._causal = causal
        self._caches: WeakKeyDictionary[Place, Any] = WeakKeyDictionary()

    def prepare(self) -> bool:
        return False

    def part(self, module: str) -> Part | None:  # noqa: ARG002  # rows of several adapters do not run side by side
        return None

    def __call__(self, step: Step) -> Tensor:
        import torch

        begin = 0
        logits = []
        for span in step.spans:
            end = begin + len(span.tokens)
            output = self._run(span, step.ids[None, begin:end], step.positions[None, begin:end])
            logits.append(output[output.shape[0] - span.outputs :])
            begin = end
        return torch.cat(logits)

    def _run(self, span: Span, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [1 or more, vocabulary] of a span's last tokens."""
        from transformers.cache_utils import DynamicCache

        cache = self._caches.setdefault(span.place, DynamicCache(config=self._causal.config))
        output = self._causal(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=max(span.outputs, 1),
        )
        logits: Tensor = output.logits[0]
        return logits
