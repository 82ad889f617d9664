"""What is exported: whole tensors under Hugging Face names, however they are stored, merged with adapters on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from calpaca.core.checkpoint.lineage import input_of
from calpaca.core.checkpoint.manifest import Input
from calpaca.core.checkpoint.plan import PlannedTensor, copied
from calpaca.core.convert.names import is_buffer
from calpaca.core.files import ModelFiles
from calpaca.core.merge.base_model import read_base
from calpaca.core.model_facts import read_facts


@dataclass(frozen=True)
class Source:
    """`config` is the language model's part of `config.json`; `tokenizer` is the folder of the tokenizer.

    `inputs` describes for the manifest what the model was made of, which may hash it. `paths` are the files that are read.
    """

    files: ModelFiles
    tensors: Mapping[str, PlannedTensor]
    config: Mapping[str, Any]
    licence: str | None
    inputs: Callable[[], tuple[Input, ...]]
    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def tokenizer(self) -> Path:
        return self.files.tokenizer

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


def read_source(files: ModelFiles) -> Source:
    """Open a model, or plan the merge of a base and its adapters; no weights are read but those of the adapters.

    Raises what `plan_merge` raises, and the first problem that it finds.
    """
    licence = read_facts(files.weights).licence
    if files.adapters:
        return _merged(files, licence)
    base = read_base(files.weights)
    tensors = {name: copied(base.checkpoint, name) for name in base.tensors if not is_buffer(name)}
    return Source(
        files, tensors, base.text_config, licence,
        lambda: (input_of("base", files.name, files.weights),),
        (*base.checkpoint.files, files.weights / "config.json"),
    )  # fmt: skip


def _merged(files: ModelFiles, licence: str | None) -> Source:
    from calpaca.core.merge import plan_merge

    plan = plan_merge(files, None)
    for problem in plan.problems:
        raise problem
    text = plan.model.texts["config.json"]
    config: dict[str, Any] = json.loads(text if isinstance(text, bytes) else text.read_bytes())
    tensors = {tensor.name: tensor for tensor in plan.model.tensors if not is_buffer(tensor.name)}
    return Source(
        files, tensors, config.get("text_config", config), licence,
        lambda: plan.model.lineage().inputs,
        plan.model.inputs,
        plan.notes,
    )  # fmt: skip
