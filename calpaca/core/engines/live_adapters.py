"""LoRA adapters that are live at once on one model: every token of a step gets the change of its own row's adapter.

All low-rank factors of a layer lie side by side, so that a step takes two more products per layer however many adapters
there are: x·Aᵀ for all ranks, those of other rows' adapters set to 0, and the result times B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import Any

import torch
from torch import Tensor, nn

from calpaca.core.adapters import Adapter, check_adapters
from calpaca.core.engines.decoder import Decoder, Part
from calpaca.core.engines.packed import PackedLinear, linear
from calpaca.core.engines.step import Step
from calpaca.core.errors import AdapterError, UnsupportedError, unknown_name
from calpaca.core.merge.arithmetic import scaling

_A, _B = ".lora_A.weight", ".lora_B.weight"

BASE = 0
"""The number of a row without an adapter."""

_PER_ROW = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights",
}  # fmt: skip
_WITHOUT_EFFECT = {  # on what is computed: where it came from, and how it was trained
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
    "lora_dropout", "runtime_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """An adapter's change of one part of a layer: A [r, in], and B [out, r] with the scaling in it."""

    adapter: int
    part: Part
    a: Tensor
    b: Tensor


class Selection:
    """Which adapter each token of the step under way has: `numbers` [tokens, 1], None when none has one."""

    def __init__(self) -> None:
        self.numbers: Tensor | None = None
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def shared(self, owners: tuple[int, ...]) -> tuple[int, ...]:
        """The same object for equal owners, so that they are told apart without comparing them."""
        return self._known.setdefault(owners, owners)

    def choose(self, numbers: Tensor | None) -> None:
        self.numbers = numbers
        self._masks.clear()

    def mask(self, owners: tuple[int, ...], like: Tensor) -> Tensor:
        """[tokens, ranks]: 1 where a rank belongs to the token's adapter, else 0; the same for layers with the same
        owners."""
        if owners not in self._masks:
            assert self.numbers is not None
            self._masks[owners] = (self.numbers == torch.tensor(owners, device=like.device)).to(like.dtype)
        return self._masks[owners]


class AdaptedLinear(nn.Module):
    """A linear layer with low-rank changes for some rows."""

    def __init__(self, layer: Any, selection: Selection) -> None:
        super().__init__()
        self.layer = layer
        self._selection = selection
        self.factors: list[Factors] = []

    def arrange(self, width: int, like: Tensor) -> None:
        """Lay the factors out for outputs of `width`, in the dtype and on the device of `like`."""
        ordered = sorted(self.factors, key=lambda factors: factors.part.begin)
        self._owners = self._selection.shared(tuple(factors.adapter for factors in ordered for _ in factors.a))
        self._a = linear(torch.cat([factors.a for factors in ordered]).to(like))
        packed = like.dtype == torch.bfloat16 and isinstance(self._a, PackedLinear)
        self._add = _joined(ordered, width, like) if packed else _apart(ordered, like)

    def forward(self, inputs: Tensor) -> Tensor:
        """[…, tokens, in] → […, tokens, out]"""
        output: Tensor = self.layer(inputs)
        if self._selection.numbers is not None:
            ranks: Tensor = self._a(inputs)
            ranks *= self._selection.mask(self._owners, ranks)
            return self._add(output, ranks)
        return output


Addition = Callable[[Tensor, Tensor], Tensor]
"""Of the product of ranks [tokens, ranks] and B to an output [tokens, out], which it may change."""


def _joined(ordered: Sequence[Factors], width: int, like: Tensor) -> Addition:
    """One product with all of B, zeros where a rank is another part's: in bfloat16 that is faster than several."""
    b = torch.zeros(width, sum(len(factors.a) for factors in ordered)).to(like)
    for factors, ranks in _ranks(ordered):
        b[factors.part.begin : factors.part.end, ranks] = factors.b.to(like)
    add: Addition = linear(b).add_to
    return add


def _apart(ordered: Sequence[Factors], like: Tensor) -> Addition:
    """A product for each part, in place."""
    products: list[tuple[slice, slice, Tensor]] = []
    for _, members in groupby(_ranks(ordered), key=lambda member: member[0].part.begin):
        factors, ranks = zip(*members, strict=True)
        part = slice(factors[0].part.begin, factors[0].part.end)
        b = torch.cat([own.b for own in factors], dim=1).to(like).T.contiguous()
        products.append((part, slice(ranks[0].start, ranks[-1].stop), b))

    def add(output: Tensor, ranks: Tensor) -> Tensor:
        rows, changes = output.flatten(0, -2), ranks.flatten(0, -2)
        for part, own, b in products:
            rows[:, part].addmm_(changes[:, own], b)
        return output

    return add


def _ranks(ordered: Sequence[Factors]) -> Iterator[tuple[Factors, slice]]:
    """Where the ranks of each are, among all."""
    begin = 0
    for factors in ordered:
        yield factors, slice(begin, begin + len(factors.a))
        begin += len(factors.a)


@dataclass
class LiveAdapters:
    """The adapters on a decoder. `load`, `remove_unused` and `select` are for the thread that runs it."""

    decoder: Decoder
    like: Tensor
    shapes: Mapping[str, tuple[int, ...]]
    tokenizer_size: int
    numbers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._selection = Selection()
        self._layers: dict[tuple[int, str], AdaptedLinear] = {}
        self._loaded: set[int] = set()
        self._next = count(BASE + 1)

    def number(self, name: str | None) -> int:
        """The number of an adapter by name. Raises AdapterError for one that is not loaded."""
        if name is None:
            return BASE
        if name not in self.numbers:
            raise AdapterError(*unknown_name("adapter", name, self.numbers))
        return self.numbers[name]

    def read(self, adapter: Adapter) -> list[Factors]:
        """An adapter's factors. Raises AdapterError for another base's, UnsupportedError for what cannot run per row."""
        _check_features(adapter)
        check_adapters([adapter], self.shapes, self.tokenizer_size)
        number = next(self._next)
        return [
            Factors(
                number,
                part,
                adapter.read(module + _A).float(),
                adapter.read(module + _B).float() * (adapter.files.scale * scaling(adapter.config, module)),
            )
            for module, part in self._parts(adapter)
        ]

    def load(self, name: str, factors: Sequence[Factors]) -> None:
        """Put an adapter on the layers. One of the same name stays for the rows that run with it."""
        widths = {}
        for own in factors:
            layer = self._layer(own.part)
            layer.factors.append(own)
            widths[layer] = own.part.width
        for layer, width in widths.items():
            layer.arrange(width, self.like)
        self.numbers[name] = factors[0].adapter
        self._loaded.add(factors[0].adapter)

    def _layer(self, part: Part) -> AdaptedLinear:
        """The layer that can change a part, put in its place at the first time."""
        key = id(part.holder), part.attribute
        if key not in self._layers:
            self._layers[key] = AdaptedLinear(getattr(part.holder, part.attribute), self._selection)
            setattr(part.holder, part.attribute, self._layers[key])
        return self._layers[key]

    def forget(self, name: str) -> None:
        """Take no more requests for an adapter. Raises AdapterError for one that is not loaded."""
        self.number(name)
        del self.numbers[name]

    def remove_unused(self, running: set[int]) -> None:
        """Take those adapters off that have no name any more, and no row of those `running`."""
        needed = running | set(self.numbers.values())
        for number in self._loaded - needed:
            self._loaded.discard(number)
            self._remove(number)

    def _remove(self, number: int) -> None:
        for (_, attribute), layer in list(self._layers.items()):
            kept = [factors for factors in layer.factors if factors.adapter != number]
            part = layer.factors[0].part
            if not kept:
                setattr(part.holder, attribute, layer.layer)
                del self._layers[id(part.holder), attribute]
            elif len(kept) < len(layer.factors):
                layer.factors = kept
                layer.arrange(part.width, self.like)

    def select(self, step: Step) -> None:
        """Say which adapter each token of a step has."""
        numbers = [span.row.adapter for span in step.spans for _ in span.tokens]
        numbers += [BASE] * (len(step.ids) - len(numbers))
        self._selection.choose(torch.tensor(numbers, device=self.like.device)[:, None] if any(numbers) else None)

    def _parts(self, adapter: Adapter) -> Iterator[tuple[str, Part]]:
        """The modules that an adapter changes, and where they are."""
        for name in adapter.shapes:
            if name.endswith(_A):
                module = name.removesuffix(_A)
                part = self.decoder.part(module)
                if part is None:
                    raise _cannot(adapter, f"changes {module}")
                yield module, part


def _check_features(adapter: Adapter) -> None:
    """Raise UnsupportedError for what is more than products added to linear layers, by its name."""
    config = {key: value for key, value in adapter.config.items() if (key, value) != ("bias", "none")}
    settings = [key for key, value in config.items() if value and key not in _PER_ROW | _WITHOUT_EFFECT]
    if settings:
        raise _cannot(adapter, f"uses {', '.join(settings)}")
    others = [name for name in adapter.shapes if not name.endswith((_A, _B))]
    if others:
        raise _cannot(adapter, f"holds {others[0]}")


def _cannot(adapter: Adapter, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"Adapter {adapter.files.name} {what}, which cannot run beside other adapters on one model.",
        "Merge it with `calpaca models merge`, or load the model with --adapter.",
    )
