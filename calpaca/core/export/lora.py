"""A LoRA adapter as a GGUF file that llama.cpp puts on a GGUF base.

llama.cpp computes with one alpha for the whole file and takes each tensor's rank from its shape: s = alpha / r. Where a
module's scaling is another one (rank-stabilised LoRA, patterns), the ratio goes into its factor B.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calpaca.core.adapters import HEAD, Adapter, check_adapters, with_head
from calpaca.core.checkpoint.dtypes import code_of
from calpaca.core.checkpoint.lineage import input_of, versions
from calpaca.core.checkpoint.manifest import Lineage, Manifest
from calpaca.core.checkpoint.plan import ModelPlan, PlannedFile, PlannedTensor, buffer_of
from calpaca.core.checkpoint.write import Command, write_model
from calpaca.core.errors import AdapterError, UnsupportedError
from calpaca.core.export.check import failed, template_of
from calpaca.core.export.float_rows import float_rows
from calpaca.core.export.gguf_architecture import GgufArchitecture, read_architecture
from calpaca.core.export.gguf_header import make_header
from calpaca.core.export.gguf_tensors import gguf_name
from calpaca.core.export.gguf_types import PLAIN, PlainType, Rows, gguf
from calpaca.core.export.modelfile import MODELFILE, modelfile
from calpaca.core.files import ModelFiles
from calpaca.core.merge.base_model import BaseModel, read_base
from calpaca.core.merge.binding import bind
from calpaca.core.merge.changes import Change, LowRank
from calpaca.core.merge.order import input_of_adapter
from calpaca.core.tokenizer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from calpaca.core.jobs import Ledger

TYPES = ("f32", "f16", "bf16")
"""Types that an adapter's factors may have."""

_EMBEDDINGS = "token_embd.weight"


@dataclass(frozen=True)
class _Factor:
    """One of the two factors of a module: its name in the file, and the tensor of the adapter that it is made of.

    `head_dim` is set where llama.cpp has the rows in another order; `transposed` where it has the matrix the other way
    round; `ratio` is multiplied in.
    """

    name: str
    type: PlainType
    adapter: Adapter
    key: str
    head_dim: int | None = None
    transposed: bool = False
    ratio: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.adapter.shapes[self.key]
        return shape[::-1] if self.transposed else shape

    def planned(self) -> PlannedTensor:
        return PlannedTensor(
            self.name,
            self.type.ggml,
            self.shape,
            self._packed,
            f"{self.key} * {self.ratio:g}" if self.ratio != 1 else self.key,
            packed=self.type.size(self.shape),
        )

    def rows(self) -> Rows:
        """All of its numbers; a factor is small."""
        tensor = self.adapter.read(self.key)
        tensor = tensor.T.contiguous() if self.transposed else tensor
        plan = PlannedTensor(
            self.name, code_of(tensor.dtype), tuple(tensor.shape), lambda: iter([buffer_of(tensor)]), self.key
        )
        rows: Rows = np.concatenate(list(float_rows(plan, self.head_dim)))
        return rows * np.float32(self.ratio) if self.ratio != 1 else rows

    def _packed(self) -> Iterator[bytes]:
        yield self.type.pack(self.rows())


@dataclass(frozen=True)
class LoraExport:
    """An adapter's GGUF file, planned."""

    file_name: str
    factors: tuple[_Factor, ...]
    model: ModelPlan

    def check(self, file: Path) -> int:
        """Read a written file back and compare every factor; returns how many there are. Raises ModelError."""
        stored = {tensor.name: tensor for tensor in gguf().GGUFReader(file).tensors}
        if stored.keys() != {factor.name for factor in self.factors}:
            raise failed("its tensors are not the adapter's")
        for factor in self.factors:
            found, expected = factor.type.unpack(np.array(stored[factor.name].data)), factor.rows()
            if found.shape != expected.shape or not np.allclose(found, expected, rtol=2**-8, atol=2**-24):
                raise failed(f"{factor.name} differs")
        return len(self.factors)


def plan_lora(files: ModelFiles, base_name: str, kind: str = "f32") -> LoraExport:
    """Plan a GGUF file of the one adapter of `files`, for its base. `base_name` is what Ollama calls the base.

    Raises UnsupportedError for what such a file cannot carry, AdapterError for an adapter that does not fit the base.
    """
    if kind not in TYPES:
        raise UnsupportedError(f"An adapter cannot be of type {kind}.", f"Take one of {', '.join(TYPES)}.")
    adapter, base = Adapter(files.adapters[0]), read_base(files.weights)
    _check_expressible(adapter, base, files)
    architecture = read_architecture(base.text_config, files.name, tied=base.tied)
    shapes = {name: stored.shape for name, stored in base.tensors.items()}
    check_adapters([adapter], shapes, 0)
    changes = _low_rank_changes(bind(adapter, base, with_head(shapes)), adapter, base)
    alpha = _alpha(changes)
    factors = [
        factor
        for name, change in changes.items()
        for factor in _factors(name, change, alpha, architecture, PLAIN[kind])
    ]
    return _planned(files, adapter, factors, architecture=architecture.name, alpha=alpha, base_name=base_name)


def _check_expressible(adapter: Adapter, base: BaseModel, files: ModelFiles) -> None:
    """Whatever is more than two factors for each module."""
    config = adapter.config
    more = [
        what
        for key, what in (
            ("use_dora", "DoRA (use_dora)"),
            ("lora_bias", "biases (lora_bias)"),
            ("trainable_token_indices", "single tokens (trainable_token_indices)"),
            ("modules_to_save", f"whole modules ({', '.join(config.get('modules_to_save') or ())})"),
        )
        if config.get(key)
    ]
    more += (
        [] if more else [f"whole tensors ({name})" for name in adapter.replaced if not _is_bases(name, adapter, base)]
    )
    if more:
        raise UnsupportedError(
            f"Adapter {adapter.files.name} trains {', '.join(more)}, which a GGUF adapter cannot carry.",
            "Merge it instead: calpaca models export"
            f" {files.weights} --adapter {adapter.files.path} --format gguf --output DIR",
        )


def _is_bases(name: str, adapter: Adapter, base: BaseModel) -> bool:
    """Whether a whole tensor is only a copy of the base's: PEFT saves those of embeddings that have factors."""
    own = base.embedding if name not in base.tensors and name == HEAD else name
    if own is None or own not in base.tensors or base.tensors[own].shape != adapter.shapes[name]:
        return False
    copy = adapter.read(name)
    return bool((copy == base.checkpoint.read(own).to(copy.dtype)).all())


def _low_rank_changes(changes: Mapping[str, Sequence[Change]], adapter: Adapter, base: BaseModel) -> dict[str, LowRank]:
    found: dict[str, LowRank] = {}
    for name, each in changes.items():
        if name not in base.tensors:
            raise UnsupportedError(
                f"Adapter {adapter.files.name} changes {name}, which the base shares with its embeddings.",
                "llama.cpp has no place for it; merge the adapter instead.",
            )
        (change,) = each
        assert isinstance(change, LowRank)  # nothing else is left after _check_expressible
        found[name] = change
    if not found:
        raise AdapterError(f"Adapter {adapter.files.name} holds no low-rank factors.", "There is nothing to export.")
    return found


def _alpha(changes: Mapping[str, LowRank]) -> float:
    """The alpha with which most modules need no ratio."""
    return Counter(change.scaling * _rank(change) for change in changes.values()).most_common(1)[0][0]


def _rank(change: LowRank) -> int:
    return change.adapter.shapes[change.a][0]


def _factors(
    name: str, change: LowRank, alpha: float, architecture: GgufArchitecture, kind: PlainType
) -> tuple[_Factor, _Factor]:
    found = gguf_name(name, architecture)
    if found is None:
        raise UnsupportedError(f"llama.cpp has no place for {name}.", "Merge the adapter instead.")
    ratio = change.scaling * _rank(change) / alpha
    return (
        _Factor(f"{found}.lora_a", kind, change.adapter, change.a, transposed=found == _EMBEDDINGS),
        _Factor(f"{found}.lora_b", kind, change.adapter, change.b, architecture.rotary_head_dim(name), ratio=ratio),
    )


def _planned(
    files: ModelFiles, adapter: Adapter, factors: Sequence[_Factor], *, architecture: str, alpha: float, base_name: str
) -> LoraExport:  # fmt: skip
    planned = tuple(factor.planned() for factor in factors)

    def describe(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_name(adapter.files.name)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, files.name)

    header = make_header(architecture, describe, planned)
    kind = factors[0].type.name
    name = f"adapter-{kind}.gguf"
    settings = {"format": "gguf", "type": kind}
    model = ModelPlan(
        (PlannedFile(name, "gguf", planned, header),),
        partial(_lineage, files, adapter, settings),
        (adapter.weights, adapter.files.path / "adapter_config.json"),
        settings | {"header": hashlib.sha256(header).hexdigest()},
        {MODELFILE: _modelfile(files, base_name, name)},
    )
    return LoraExport(name, tuple(factors), model)


def _modelfile(files: ModelFiles, base_name: str, adapter: str) -> bytes:
    template, add_bos = None, False
    if has_tokenizer(files.tokenizer):
        tokenizer = load_tokenizer(files.tokenizer)
        template = template_of(tokenizer, files)
        plain, ended = tokenizer.encode("a"), tokenizer.encode("a", special_tokens=True)
        add_bos = len(ended) > len(plain) and ended[0] != plain[0]
    return modelfile(base_name, template, add_bos=add_bos, adapter=adapter).encode()


def _lineage(files: ModelFiles, adapter: Adapter, settings: Mapping[str, Any]) -> Lineage:
    inputs = (input_of("base", files.name, files.weights), input_of_adapter(adapter))
    return Lineage("export", inputs, settings, None, versions())


def export_lora(
    files: ModelFiles, output: Path, jobs: Ledger, *, base_name: str, kind: str = "f32", command: Command | None = None
) -> tuple[Manifest, int]:
    """Write a folder with the adapter's GGUF file, a Modelfile and a manifest; returns it and the number of factors.

    Raises what `plan_lora` and `write_model` raise.
    """
    export = plan_lora(files, base_name, kind)
    plan = replace(export.model, check=lambda folder: export.check(folder / export.file_name))
    return write_model(plan, output, jobs, command), len(export.factors)
