"""Planning a merge: everything is read from headers and checked before a byte is written."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calpaca.core.adapters import HEAD, Adapter, check_adapters
from calpaca.core.checkpoint.dtypes import code_of
from calpaca.core.checkpoint.lineage import input_of, versions
from calpaca.core.checkpoint.manifest import CONTEXT_LENGTH, Input, Lineage, Manifest
from calpaca.core.checkpoint.plan import (
    SHARD_SIZE,
    Container,
    ModelPlan,
    PlannedFile,
    PlannedTensor,
    hugging_face_files,
)
from calpaca.core.checkpoint.write import Command, write_model
from calpaca.core.convert.parts import pth_files, pth_params
from calpaca.core.convert.source import PARAMS
from calpaca.core.convert.tokenizer_files import TokenizerFiles, template_digest
from calpaca.core.errors import CalpacaError, UsageError
from calpaca.core.files import ModelFiles
from calpaca.core.merge.ahead import a_core_for_hashing, look_ahead
from calpaca.core.merge.base_model import BaseModel, read_base
from calpaca.core.merge.changes import Scratch
from calpaca.core.merge.checks import Findings, check_effects, check_place
from calpaca.core.merge.order import check_vocabulary_order, input_of_adapter, lineage_problems
from calpaca.core.merge.recipe import Accumulate, Recipe, check_rows, stages
from calpaca.core.merge.texts import merged_config, merged_tokenizer, small_files

if TYPE_CHECKING:
    from calpaca.core.jobs import Ledger

Format = Literal["safetensors", "bin", "pth"]


@dataclass(frozen=True)
class MergeOptions:
    """`accumulate`: `compat` rounds to the weight's dtype after each adapter, as PEFT does; `fp32` once, at the end.

    `shard_size` is in bytes; `parts` counts the files of `pth`. `dtype` (`float32`, `bfloat16`, `float16`) is what the
    base is loaded in before; None leaves it. `force` overrides what manifests record about order, parents and bases,
    and nothing else.
    """

    accumulate: Accumulate = "compat"
    format: Format = "safetensors"
    shard_size: int = SHARD_SIZE
    parts: int = 1
    dtype: str | None = None
    force: bool = False


@dataclass(frozen=True)
class MergePlan:
    """What would be written, and what is wrong with it. `problems` stop the merge, `notes` are worth knowing."""

    files: ModelFiles
    options: MergeOptions
    model: ModelPlan
    recipes: dict[str, Recipe]
    base: BaseModel
    output: Path | None
    problems: tuple[CalpacaError, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def operations(self) -> dict[str, int]:
        """How many tensors are made in which way."""
        kinds = (" + ".join(recipe.kinds) or "copied" for recipe in self.recipes.values())
        return dict(Counter(kinds).most_common())

    @property
    def reshaped(self) -> dict[str, tuple[tuple[int, ...] | None, tuple[int, ...]]]:
        """Tensors whose shape is not the base's: before (None for one that the base does not store) and after."""
        before = {name: stored.shape for name, stored in self.base.tensors.items()}
        return {
            name: (before.get(name), recipe.shape)
            for name, recipe in self.recipes.items()
            if before.get(name) != recipe.shape
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values. Sizes are in bytes."""
        return {
            "base": str(self.files.weights),
            "adapters": [{"path": str(each.path), "scale": each.scale} for each in self.files.adapters],
            "output": str(self.output) if self.output is not None else None,
            "accumulate": self.options.accumulate,
            "operations": self.operations,
            "reshaped": {name: {"before": old, "after": new} for name, (old, new) in self.reshaped.items()},
            "tied": HEAD not in self.recipes and self.base.tied,
            "files": {file.name: file.size for file in self.model.files},
            "size": self.model.size,
            "memory": self.model.memory,
            "disk_needed": self.model.size,
            "disk_free": _free(self.output or Path.cwd()),
            "problems": [{"message": each.message, "hint": each.hint} for each in self.problems],
            "notes": list(self.notes),
        }


def plan_merge(files: ModelFiles, output: Path | None, options: MergeOptions | None = None) -> MergePlan:
    """Plan merging the adapters of `files` into its base, in order. Reads the adapters' values, and none of the base's.

    Without `output` it cannot be carried out. Raises AdapterError, UnsupportedError, CorruptFileError or ModelError for
    what cannot be planned; what could be written, but must not be, is in the plan's `problems`.
    """
    options = options or MergeOptions()
    inputs = _read_inputs(files, output)
    steps = stages(inputs.base, inputs.adapters, code_of(options.dtype) if options.dtype is not None else None)
    rows = check_rows(steps[-1], inputs.base)
    model = _model_plan(inputs, steps[-1], options)
    findings = Findings()
    check_place(output, model.size, findings)
    for problem in lineage_problems(files, inputs.adapters, output, inputs.described):
        findings.add(problem, forced=options.force)
    with a_core_for_hashing():
        check_effects(inputs.base, inputs.adapters, steps, findings)
    findings.notes += _vocabulary_notes(rows, inputs.tokenizer)
    if inputs.base.tied and HEAD in steps[-1]:
        findings.notes.append(f"Embeddings and output layer are no longer tied: {HEAD} is written, too.")
    return MergePlan(
        files, options, model, steps[-1], inputs.base, output, tuple(findings.problems), tuple(findings.notes)
    )


def merge(plan: MergePlan, jobs: Ledger, command: Command | None = None) -> Manifest:
    """Write the merged model, or go on with a merge that was interrupted. Raises the plan's first problem, and what
    `write_model` raises."""
    for problem in plan.problems:
        raise problem
    if plan.output is None:
        raise UsageError("It is not said where to write.", "Plan the merge with an output folder.")
    with a_core_for_hashing():
        return write_model(plan.model, plan.output, jobs, command)


@dataclass(frozen=True)
class _Inputs:
    """What is merged, opened. `described` are the adapters as the manifest names them, with all their digests."""

    files: ModelFiles
    base: BaseModel
    adapters: tuple[Adapter, ...]
    tokenizer: TokenizerFiles | None
    described: Future[list[Input]]


def _read_inputs(files: ModelFiles, output: Path | None) -> _Inputs:
    if not files.adapters:
        raise UsageError("There is nothing to merge.", "Name the adapters, in order, with --adapter.")
    base, adapters = read_base(files.weights), tuple(map(Adapter, files.adapters))
    check_vocabulary_order(files, adapters, output)
    tokenizer = merged_tokenizer(files)
    size = tokenizer.size if tokenizer is not None else 0
    check_adapters(adapters, {name: stored.shape for name, stored in base.tensors.items()}, size)
    return _Inputs(files, base, adapters, tokenizer, _described(adapters))


def _described(adapters: Sequence[Adapter]) -> Future[list[Input]]:
    """Begin to hash the adapters: that is done while torch is loaded, and while their values are checked."""
    pool = ThreadPoolExecutor(1)
    described = pool.submit(lambda: [input_of_adapter(adapter) for adapter in adapters])
    pool.shutdown(wait=False)
    return described


def _model_plan(inputs: _Inputs, made: Mapping[str, Recipe], options: MergeOptions) -> ModelPlan:
    scratch = Scratch()
    tensors = [recipe.planned(name, options.accumulate, scratch) for name, recipe in made.items()]
    texts = small_files(inputs.files, inputs.base, made, inputs.tokenizer)
    config = merged_config(inputs.base, made)
    settings = {"accumulate": options.accumulate, "dtype": options.dtype, "format": options.format}
    if options.format == "pth":
        texts = _pth_texts(texts, tensors, config)
        settings[CONTEXT_LENGTH] = config.get("max_position_embeddings")
    configs = [{"scale": each.files.scale, "config": dict(each.config)} for each in inputs.adapters]
    return ModelPlan(
        _planned_files(tensors, config, options),
        partial(_lineage, inputs, settings, template_digest(texts)),
        (*inputs.base.checkpoint.files, *(adapter.weights for adapter in inputs.adapters)),
        settings | {"adapters": configs},
        texts,
    )


def _planned_files(
    tensors: Sequence[PlannedTensor], config: Mapping[str, Any], options: MergeOptions
) -> tuple[PlannedFile, ...]:
    if options.format == "pth":
        return pth_files(tensors, config, options.parts)
    container: Container = "safetensors" if options.format == "safetensors" else "torch"
    return hugging_face_files(look_ahead(tensors), container, options.shard_size)


def _pth_texts(
    texts: Mapping[str, bytes | Path], tensors: Sequence[PlannedTensor], config: Mapping[str, Any]
) -> dict[str, bytes | Path]:
    """An original checkpoint has its own description of the model instead of `config.json`."""
    kept = {name: content for name, content in texts.items() if name != "config.json"}
    return {**kept, PARAMS: pth_params(tensors, config)}


def _lineage(inputs: _Inputs, settings: Mapping[str, Any], template: str | None) -> Lineage:
    base = input_of("base", inputs.files.name, inputs.files.weights)
    return Lineage("merge", (base, *inputs.described.result()), settings, template, versions())


def _vocabulary_notes(rows: int | None, tokenizer: TokenizerFiles | None) -> list[str]:
    if tokenizer is None:
        return ["Neither the base nor an adapter brings a tokenizer: none is written."]
    if rows is not None and rows > tokenizer.size:
        return [f"{rows - tokenizer.size} of the {rows} embedding rows have no token."]
    return []


def _free(folder: Path) -> int:
    """Bytes on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.is_dir())).free
