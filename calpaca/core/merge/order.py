"""Whether adapters belong on this base and stand in the right order, by what their manifests record.

Training with calpaca writes a manifest beside an adapter: the base it was trained on, and the adapters that were on it
then, its parents. An adapter without a manifest says nothing and is taken as it is.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from calpaca.core.adapters import Adapter, check_order, vocabulary_order
from calpaca.core.checkpoint.lineage import find_weights, input_of
from calpaca.core.checkpoint.manifest import Input, Lineage, read_manifest
from calpaca.core.errors import AdapterError
from calpaca.core.files import ModelFiles

FORCED = "--force merges all the same."


def input_of_adapter(adapter: Adapter) -> Input:
    """The adapter as an input of a plan, with the digest over its tensors."""
    weights = find_weights(adapter.files.path)
    found = input_of(
        "adapter", adapter.files.name, adapter.files.path, scale=adapter.files.scale, config=adapter.config
    )
    return replace(found, weights=weights)


@dataclass(frozen=True)
class _Position:
    """Where an adapter stands: all adapters, its number among them, and what the base is made of."""

    adapters: Sequence[Input]
    number: int
    base: Sequence[Input]

    @property
    def adapter(self) -> Input:
        return self.adapters[self.number]

    @property
    def before(self) -> Sequence[Input]:
        return self.adapters[: self.number]

    def later(self, recorded: Input) -> int | None:
        """Where a recorded adapter stands after this one."""
        numbers = range(self.number + 1, len(self.adapters))
        return next((number for number in numbers if _same(recorded, self.adapters[number])), None)

    def later_part(self, recorded: Input) -> int | None:
        """Where an adapter that was merged into a recorded base stands after this one."""
        parts = (self.later(part) for part in recorded.every() if part.role == "adapter")
        return next((number for number in parts if number is not None), None)

    def has_base(self, recorded: Input) -> bool:
        """Whether the model, as it is here, is or contains a recorded base."""
        if any(_same(recorded, each) for each in self.base if each.role == "base"):
            return True
        return bool(recorded.made_of) and all(
            self.has_base(each) if each.role == "base" else self.has_adapter(each) for each in recorded.made_of
        )

    def has_adapter(self, recorded: Input) -> bool:
        return any(_same(recorded, each) for each in (*self.base, *self.before) if each.role == "adapter")


def check_vocabulary_order(files: ModelFiles, adapters: Sequence[Adapter], output: Path | None) -> None:
    """`check_order`, with the whole command to type instead."""
    try:
        check_order(adapters)
    except AdapterError as error:
        right = merge_command(files, vocabulary_order(adapters), output)
        raise AdapterError(error.message, f"Type: {right}") from error


def lineage_problems(
    files: ModelFiles, adapters: Sequence[Adapter], output: Path | None, described: Future[list[Input]] | None = None
) -> Iterator[AdapterError]:
    """Everything that is wrong by what is recorded: an adapter given twice, contained in the base already, made for
    another base, or standing before its parent or without it. `described` are the adapters by `input_of_adapter`, where
    that was begun before."""
    recorded = [_recorded(adapter) for adapter in adapters]
    base_manifest = read_manifest(files.weights)
    if len(adapters) < 2 and base_manifest is None and not any(recorded):
        return
    inputs = described.result() if described is not None else [input_of_adapter(adapter) for adapter in adapters]
    base = _base_inputs(files, needs_weights=any(recorded))
    for number, lineage in enumerate(recorded):
        position = _Position(inputs, number, base)
        yield from _twice(position, files.name)
        if lineage is not None:
            yield from _unmet(lineage, position, files, output)


def _recorded(adapter: Adapter) -> Lineage | None:
    """What training wrote down about an adapter; None when it wrote nothing."""
    manifest = read_manifest(adapter.files.path)
    return manifest.lineage if manifest is not None and manifest.lineage.operation == "train" else None


def _base_inputs(files: ModelFiles, *, needs_weights: bool) -> tuple[Input, ...]:
    """The base and everything it was made of."""
    base = input_of("base", files.name, files.weights)
    if needs_weights:
        base = replace(base, weights=find_weights(files.weights))
    return base.every()


def _same(a: Input, b: Input) -> bool:
    return (bool(a.weights) and a.weights == b.weights) or a.fingerprint == b.fingerprint


def _twice(position: _Position, base: str) -> Iterator[AdapterError]:
    adapter = position.adapter
    if any(_same(adapter, each) for each in position.before):
        yield AdapterError(f"Adapter {adapter.name} is given twice.", f"Give it once. {FORCED}")
    if any(_same(adapter, each) for each in position.base if each.role == "adapter"):
        yield AdapterError(
            f"{base} contains adapter {adapter.name} already: it was merged into it.", f"Leave it out. {FORCED}"
        )


def _unmet(lineage: Lineage, position: _Position, files: ModelFiles, output: Path | None) -> Iterator[AdapterError]:
    """What an adapter was trained on and does not find here."""
    for each in lineage.inputs:
        if each.role == "base" and not position.has_base(each):
            later = position.later_part(each)
            if later is None:
                yield _other_base(position.adapter.name, each, files.name)
            else:
                yield _reversed(position, later, files, output)
        elif each.role == "adapter" and not position.has_adapter(each):
            later = position.later(each)
            if later is None:
                yield _missing_parent(position.adapter.name, each)
            else:
                yield _reversed(position, later, files, output)


def _other_base(name: str, recorded: Input, base: str) -> AdapterError:
    digest = f"weights {recorded.weights[:12]}" if recorded.weights else f"fingerprint {recorded.fingerprint[:12]}"
    return AdapterError(
        f"Adapter {name} was trained on {recorded.name} ({digest}…), and {base} is another model.",
        f"Name the base it was trained on. {FORCED}",
    )


def _missing_parent(name: str, parent: Input) -> AdapterError:
    return AdapterError(
        f"Adapter {name} was trained on top of adapter {parent.name}, which is neither given before it nor contained in"
        " the base.",
        f"Give --adapter {parent.name} before it. {FORCED}",
    )


def _reversed(position: _Position, parent: int, files: ModelFiles, output: Path | None) -> AdapterError:
    order = [number for number in range(len(position.adapters)) if number != parent]
    order.insert(position.number, parent)
    return AdapterError(
        f"The adapters stand in the wrong order: {position.adapter.name} was trained on top of"
        f" {position.adapters[parent].name}, which comes after it.",
        f"Type: {merge_command(files, order, output)}",
    )


def merge_command(files: ModelFiles, order: Sequence[int], output: Path | None) -> str:
    """The command that merges the same adapters in another order."""
    typed = [str(adapter) for adapter in files.spec.adapters] or [adapter.name for adapter in files.adapters]
    adapters = [word for at in order for word in ("--adapter", typed[at])]
    base = files.spec.model or files.name
    return shlex.join(["calpaca", "models", "merge", base, *adapters, "--output", str(output or "DIR")])
