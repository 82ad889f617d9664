"""How each tensor of the merged model is made: where it begins, and the changes on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

from calpaca.core.adapters import HEAD, Adapter, with_head
from calpaca.core.checkpoint.dtypes import NAMES, to_torch
from calpaca.core.checkpoint.plan import PlannedTensor, buffer_of, copied
from calpaca.core.checkpoint.reader import Checkpoint
from calpaca.core.errors import AdapterError, ModelError, UnsupportedError
from calpaca.core.merge import arithmetic
from calpaca.core.merge.base_model import BaseModel
from calpaca.core.merge.binding import bind
from calpaca.core.merge.changes import Change, Scratch
from calpaca.core.merge.tie import replacements, tie_rows

if TYPE_CHECKING:
    from torch import Tensor

Accumulate = Literal["compat", "fp32"]

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Recipe:
    """A tensor begins as `key` of `source` and is changed in order. `dtype` is the code of the result."""

    source: Checkpoint
    key: str
    dtype: str
    changes: tuple[Change, ...] = ()
    replaced_by: Adapter | None = None
    """The adapter whose whole tensor it begins with."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.tensors[self.key].shape

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is done, in words."""
        replaced = ("replaced",) if self.replaced_by is not None else ()
        return (*replaced, *dict.fromkeys(change.kind for change in self.changes))

    def planned(self, name: str, accumulate: Accumulate, scratch: Scratch) -> PlannedTensor:
        """The tensor to be written. Bytes are copied where nothing changes, and rounded piece by piece where only the
        dtype does."""
        stored = self.source.tensors[self.key]
        if not self.changes and stored.dtype == self.dtype:
            return copied(self.source, self.key, name)
        origin = "; ".join([f"{stored.file.name}: {self.key}", *(change.describe() for change in self.changes)])
        if not self.changes:
            return PlannedTensor(name, self.dtype, self.shape, lambda: self._cast(name), origin)
        memory = max(change.memory(self.shape) for change in self.changes)
        if accumulate == "fp32" or stored.dtype != self.dtype:
            memory += 4 * prod(self.shape)
        return PlannedTensor(
            name, self.dtype, self.shape, lambda: [buffer_of(self.make(name, accumulate, scratch))], origin, memory
        )

    def make(self, name: str, accumulate: Accumulate, scratch: Scratch) -> Tensor:
        """The tensor, whole. `compat` rounds after each adapter, `fp32` at the end. Raises ModelError."""
        import torch

        target = to_torch(self.dtype)
        try:
            working = torch.promote_types(target, torch.float32) if accumulate == "fp32" else target
            weight = arithmetic.rounded(self.source.read(self.key, scratch.weights), working)
            for change in self.changes:
                weight = change.apply(weight, scratch)
            return arithmetic.rounded(weight, target)
        except arithmetic.NotFinite as error:
            raise _not_finite(name, self.dtype, error) from error

    def _cast(self, name: str) -> Iterator[memoryview]:
        stored = self.source.tensors[self.key]
        try:
            for piece in arithmetic.cast(self.source.chunks(self.key), to_torch(stored.dtype), to_torch(self.dtype)):
                yield buffer_of(piece)
        except arithmetic.NotFinite as error:
            raise _not_finite(name, self.dtype, error) from error


def stages(base: BaseModel, adapters: Sequence[Adapter], dtype: str | None) -> list[dict[str, Recipe]]:
    """A recipe for each tensor, by name, in the order of the base: without adapters, with the first, with two, …

    While the output layer is tied to the embeddings it has no recipe of its own. It gets one as soon as an adapter
    changes one end and not the other. `dtype` (a code) is that of all floating-point tensors, None leaves them.
    """
    steps = [
        {name: Recipe(base.checkpoint, name, _target(stored.dtype, dtype)) for name, stored in base.tensors.items()}
    ]
    for adapter in adapters:
        steps.append(_with_adapter(steps[-1], adapter, base))
    return steps


def _target(stored: str, wanted: str | None) -> str:
    return wanted if wanted is not None and stored in FLOATS else stored


def _with_adapter(made: dict[str, Recipe], adapter: Adapter, base: BaseModel) -> dict[str, Recipe]:
    tied = base.embedding is not None and HEAD not in made and base.tied
    ends = dict(made)
    if tied:
        ends[HEAD] = made[str(base.embedding)]
    replaced = replacements(adapter, base, tied)
    _check_places(adapter, replaced, ends)
    after = {name: _replace(recipe, adapter, replaced.get(name)) for name, recipe in ends.items()}
    changes = bind(adapter, base, with_head({name: recipe.shape for name, recipe in after.items()}))
    if tied:
        changes = tie_rows(changes, adapter, base)
    _check_places(adapter, changes, ends)
    for name, added in changes.items():
        _check_float(adapter, name, after[name])
        after[name] = replace(after[name], changes=(*after[name].changes, *added))
    if tied and after[HEAD] == after[str(base.embedding)]:
        del after[HEAD]
    return after


def _replace(recipe: Recipe, adapter: Adapter, name: str | None) -> Recipe:
    if name is None:
        return recipe
    return Recipe(adapter.checkpoint, adapter.keys[name], recipe.dtype, replaced_by=adapter)


def _check_places(adapter: Adapter, names: Iterable[str], made: Mapping[str, Recipe]) -> None:
    for name in names:
        if name not in made:
            raise AdapterError(
                f"Adapter {adapter.files.name} changes {name}, which the base does not have.",
                "Name the base it was trained on.",
            )


def _check_float(adapter: Adapter, name: str, recipe: Recipe) -> None:
    stored = recipe.source.tensors[recipe.key].dtype
    if stored not in FLOATS:
        raise UnsupportedError(
            f"Adapter {adapter.files.name} changes {name}, which is stored as {stored}: the base is quantized.",
            "Merge into the weights that it was quantized from.",
        )


def _not_finite(name: str, dtype: str, error: arithmetic.NotFinite) -> ModelError:
    return ModelError(
        f"{name} would get {error}, which {NAMES[dtype]} cannot hold.",
        "Merge with --dtype bfloat16 or float32; if it is NaN, the base or an adapter is damaged.",
    )


def check_rows(made: dict[str, Recipe], base: BaseModel) -> int | None:
    """The vocabulary's size by both ends of the model. Raises ModelError where they differ."""
    if base.embedding is None:
        return None
    rows = made[base.embedding].shape[0]
    head = made[HEAD].shape[0] if HEAD in made else rows
    if rows != head:
        raise ModelError(
            f"{base.embedding} would get {rows} rows and {HEAD} {head}: an adapter brings only one of them.",
            "Take an adapter that was saved with both (modules_to_save: embed_tokens, lm_head).",
        )
    return rows
