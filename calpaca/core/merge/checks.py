"""What is looked at before a byte is written: the disk, and whether an adapter's values are finite and do something."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calpaca.core.adapters import HEAD, Adapter
from calpaca.core.checkpoint.dtypes import to_torch
from calpaca.core.checkpoint.write import check_output, work_folder
from calpaca.core.disk import check_space
from calpaca.core.errors import AdapterError, CalpacaError, UnsupportedError
from calpaca.core.merge import arithmetic
from calpaca.core.merge.base_model import BaseModel
from calpaca.core.merge.changes import Change, LowRank, Scratch
from calpaca.core.merge.recipe import FLOATS, Recipe


@dataclass
class Findings:
    """What was found: `problems` forbid the merge, `notes` are for a person."""

    problems: list[CalpacaError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, problem: CalpacaError, *, forced: bool = False) -> None:
        """A problem, which is only a note when the person wants the merge all the same."""
        if forced:
            self.notes.append(f"{problem.message} It is merged all the same.")
        else:
            self.problems.append(problem)


def check_place(output: Path | None, size: int, findings: Findings) -> None:
    """The output must be free and its disk large enough for what is not written there yet."""
    try:
        if output is not None:
            check_output(output)
        begun = work_folder(output) if output is not None else None
        written = sum(file.stat().st_size for file in begun.iterdir()) if begun is not None and begun.is_dir() else 0
        place = (output or Path.cwd()).absolute().parent
        check_space(place, size - written, "The merged model", "or name an --output on another disk")
    except CalpacaError as error:
        findings.add(error)


def check_effects(
    base: BaseModel, adapters: Sequence[Adapter], steps: Sequence[Mapping[str, Recipe]], findings: Findings
) -> None:
    """Every adapter's values must be finite and change something. `steps` are the recipes before and after each."""
    for adapter, before, after in zip(adapters, steps, steps[1:], strict=False):
        try:
            zero = check_values(adapter)
            if changes_nothing(before, after, adapter, zero, base):
                raise nothing_changed(adapter)
            findings.notes += notes_on_values(adapter, zero)
        except CalpacaError as error:
            findings.add(error)


def check_values(adapter: Adapter) -> frozenset[str]:
    """Read all of an adapter; returns the names of the tensors that are zero. Raises AdapterError for NaN and inf."""
    zero = set()
    for name, key in adapter.keys.items():
        stored = adapter.checkpoint.tensors[key]
        if stored.dtype not in FLOATS:
            raise UnsupportedError(
                f"{adapter.weights} holds {key} as {stored.dtype}.", "Save the adapter in float32 or bfloat16."
            )
        dtype, seen = to_torch(stored.dtype), set[tuple[float, float]]()
        for piece in arithmetic.elements(adapter.checkpoint.chunks(key), dtype):
            seen.add(found := arithmetic.bounds(piece))
            if not arithmetic.fits(*found, dtype):
                raise AdapterError(
                    f"{adapter.weights} is damaged: {key} holds {found[0]:g} and {found[1]:g}.",
                    "Take another checkpoint of its training.",
                )
        if seen <= {(0.0, 0.0)}:
            zero.add(name)
    return frozenset(zero)


def changes_nothing(
    before: Mapping[str, Recipe], after: Mapping[str, Recipe], adapter: Adapter, zero: frozenset[str], base: BaseModel
) -> bool:
    """Whether an adapter leaves every tensor as it is, so that no logit can change."""
    pairs = [(_earlier(name, before, base), recipe) for name, recipe in after.items()]
    changed = [(old, new) for old, new in pairs if old != new]
    if any(_adds(change, zero) for _, new in changed for change in new.changes if change.adapter == adapter):
        return False
    return all(_digest(old) == _digest(new) for old, new in changed)


def _earlier(name: str, before: Mapping[str, Recipe], base: BaseModel) -> Recipe:
    """How a tensor was made before; an output layer that was tied then was the embeddings."""
    return before[name] if name in before or name != HEAD else before[str(base.embedding)]


def _adds(change: Change, zero: frozenset[str]) -> bool:
    """Whether a change surely changes something, by the adapter's tensors alone."""
    if not isinstance(change, LowRank) or change.magnitude is not None:
        return False
    return change.scaling != 0 and not {change.a, change.b} & zero


def _digest(recipe: Recipe) -> tuple[tuple[int, ...], str]:
    digest = hashlib.sha256()
    for chunk in recipe.planned("", "compat", Scratch()).chunks():
        digest.update(chunk)
    return recipe.shape, digest.hexdigest()


def nothing_changed(adapter: Adapter) -> AdapterError:
    """The error for an adapter without effect."""
    return AdapterError(
        f"Adapter {adapter.files.name} changes no logit: what it adds is zero and what it replaces is the same.",
        "Its training saved nothing, or stopped before the first step; take another checkpoint.",
    )


def notes_on_values(adapter: Adapter, zero: frozenset[str]) -> Iterator[str]:
    """Remarks for a person: factors that are zero though the adapter is not."""
    factors = sorted(name for name in zero if ".lora_" in name)
    if factors:
        yield f"{adapter.files.name}: {len(factors)} of its factors are zero ({factors[0]}, …): those layers stay."
