"""The tensors of a GGUF file, planned from those of a Hugging Face model: names, row order, types, bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from calpaca.core.checkpoint.plan import PlannedTensor, buffer_of
from calpaca.core.convert.names import HF_EMBEDDINGS, HF_OUTPUT
from calpaca.core.errors import CorruptFileError, UnsupportedError
from calpaca.core.export.float_rows import float_rows
from calpaca.core.export.gguf_architecture import GgufArchitecture
from calpaca.core.export.gguf_types import PLAIN, PlainType, Rows, gguf, type_of

ROPE_FACTORS = "rope_freqs.weight"
_MOST_HALF = float(np.finfo(np.float16).max)
_NEEDED = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
_WORK = 64 << 20  # bytes of numbers in work, whatever the tensor's size


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: its name and type there, and the one at Hugging Face that it is made of."""

    name: str
    type: PlainType
    source: PlannedTensor
    head_dim: int | None

    def planned(self) -> PlannedTensor:
        return PlannedTensor(
            self.name,
            self.type.ggml,
            self.source.shape,
            partial(_pack, self),
            f"{self.source.origin} as {self.type.name}",
            memory=_WORK,
            packed=self.type.size(self.source.shape),
        )

    def rows(self) -> Iterator[Rows]:
        """Its numbers before they are rounded, in the file's order, block by block."""
        return float_rows(self.source, self.head_dim)


def gguf_tensors(
    tensors: Mapping[str, PlannedTensor], architecture: GgufArchitecture, wanted: PlainType
) -> list[GgufTensor]:
    """Every tensor of the file, in the order of the layers.

    Raises CorruptFileError when the model lacks one, UnsupportedError for one that llama.cpp has no place for.
    """
    _check_complete(tensors, architecture)
    names = {name: gguf_name(name, architecture) for name in tensors}
    unknown = [name for name, found in names.items() if found is None]
    if unknown:
        raise UnsupportedError(
            f"{len(unknown)} tensors have no place in a GGUF file of architecture {architecture.name}: {unknown[0]} …",
            "Only the model's own tensors can be exported; merge adapters first.",
        )
    made = [
        GgufTensor(
            found,
            type_of(found, tensors[name].shape, wanted, tied=architecture.tied),
            tensors[name],
            architecture.rotary_head_dim(name),
        )
        for name, found in names.items()
        if found is not None
    ]
    factors = architecture.rope_factors()
    if factors is not None:
        made.append(GgufTensor(ROPE_FACTORS, PLAIN["f32"], _constant(factors), None))
    return sorted(made, key=lambda tensor: _place(tensor.name))


def gguf_name(name: str, architecture: GgufArchitecture) -> str | None:
    """The name in a GGUF file of a tensor at Hugging Face; None where llama.cpp has no place for it."""
    package = gguf()
    kind = package.MODEL_ARCH[architecture.name.upper()]
    found: str | None = package.get_tensor_name_map(kind, architecture.layers).get_name(name, (".weight", ".bias"))
    return found


def widened(tensors: list[GgufTensor], wanted: PlainType) -> list[str]:
    """Names of matrices that became float16 since their rows do not divide into the blocks of `wanted`."""
    return [
        tensor.name
        for tensor in tensors
        if tensor.type.name == "f16" and len(tensor.source.shape) > 1 and tensor.source.shape[-1] % wanted.block
    ]


def _check_complete(tensors: Mapping[str, PlannedTensor], architecture: GgufArchitecture) -> None:
    layers = range(architecture.layers)
    needed = [f"model.layers.{number}.{stem}.weight" for number in layers for stem in _NEEDED]
    ends = [HF_EMBEDDINGS, "model.norm.weight", *([] if architecture.tied else [HF_OUTPUT])]
    missing = [name for name in (*ends, *needed) if name not in tensors]
    if missing:
        raise CorruptFileError(
            f"The model lacks {len(missing)} tensors of its {architecture.layers} layers, for example {missing[0]}.",
            "Fetch all of its files again.",
        )


def _place(name: str) -> tuple[int, str]:
    """Embeddings and what is outside the layers first, then layer by layer."""
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1), name


def _pack(tensor: GgufTensor) -> Iterator[bytes]:
    for rows in tensor.rows():
        if tensor.type.name == "f16" and float(np.abs(rows).max(initial=0.0)) > _MOST_HALF:
            raise UnsupportedError(
                f"{tensor.source.name} holds {float(np.abs(rows).max()):g}, which f16 cannot.",
                "Take --type bf16 or q8_0.",
            )
        yield tensor.type.pack(rows)


def _constant(numbers: np.ndarray[Any, np.dtype[np.float32]]) -> PlannedTensor:
    import torch

    return PlannedTensor(
        ROPE_FACTORS, "F32", numbers.shape, lambda: iter([buffer_of(torch.from_numpy(numbers))]), "rope_scaling"
    )
