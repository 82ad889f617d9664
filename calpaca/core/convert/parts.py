"""Original checkpoints in parts: read as whole tensors under Hugging Face names, and laid out from such tensors.

Each part holds a slice of every matrix, along its rows or its columns, for one of the devices that ran the model. A
device needs a whole key-value head, so where there are fewer heads than parts (Llama 3.1 405B: 8 in 16), neighbouring
parts hold the same one, the head that their queries attend with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, Literal

from calpaca.core.checkpoint.dtypes import SIZES
from calpaca.core.checkpoint.plan import Buffer, PlannedFile, PlannedTensor, copied
from calpaca.core.checkpoint.reader import Checkpoint, read_file
from calpaca.core.convert.architecture import (
    Architecture,
    Shapes,
    check_shapes,
    from_config,
    from_params,
    to_params,
)
from calpaca.core.convert.json_file import read_object
from calpaca.core.convert.names import (
    EMBEDDINGS,
    HF_EMBEDDINGS,
    HF_OUTPUT,
    NORM,
    Layout,
    hf_names,
    is_buffer,
    layout,
    names,
    to_hf,
    to_original,
)
from calpaca.core.convert.rows import beside, columns, halves, pairs, row_size, rows
from calpaca.core.convert.source import PARAMS, part_files, part_number
from calpaca.core.errors import CorruptFileError, ModelNotFoundError, UnsupportedError, UsageError

_FLOATS = {"F16", "BF16", "F32"}


# ---- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OriginalCheckpoint:
    """An original checkpoint: its parts, what model it is, and its whole tensors under Hugging Face names."""

    folder: Path
    parts: tuple[Checkpoint, ...]
    architecture: Architecture
    tensors: tuple[PlannedTensor, ...]


def open_original(folder: Path) -> OriginalCheckpoint:
    """Open the `consolidated.NN.pth` parts and `params.json` of a folder. Reads no weights.

    Raises ModelNotFoundError for a missing file, CorruptFileError for parts that are damaged or do not fit together.
    """
    parts = _open_parts(folder)
    params = read_object(folder / PARAMS)
    shapes: Mapping[str, tuple[int, ...]] = _whole_shapes(folder, parts)
    _check_count(folder, len(parts), shapes)
    architecture = from_params(params, shapes, str(folder))
    shapes = _without_copies(shapes, architecture, len(parts))
    check_shapes(architecture, shapes, str(folder))
    tensors = {
        tensor.name: tensor for name in names(architecture.layers) for tensor in [_join(name, parts, architecture)]
    }
    return OriginalCheckpoint(
        folder, parts, architecture, tuple(tensors[name] for name in hf_names(architecture.layers))
    )


def _open_parts(folder: Path) -> tuple[Checkpoint, ...]:
    files = part_files(folder)
    if not files:
        raise ModelNotFoundError(
            f"{folder} holds no consolidated.NN.pth.", "Name the folder of an original checkpoint."
        )
    missing = sorted(set(range(part_number(files[-1]) + 1)) - set(map(part_number, files)))
    if missing:
        raise CorruptFileError(
            f"{folder} has {files[-1].name}, but lacks consolidated.{missing[0]:02}.pth.", "Fetch the missing part."
        )
    parts = tuple(Checkpoint(file, _known(file)) for file in files)
    for other in parts[1:]:
        _check_alike(parts[0], other)
    return parts


def _known(file: Path) -> dict[str, Any]:
    """The tensors of a part without the buffers. Raises UnsupportedError for names that LLaMA does not have."""
    tensors = {name: stored for name, stored in read_file(file).items() if not is_buffer(name)}
    unknown = [name for name in tensors if to_hf(name) is None]
    if unknown:
        hint = (
            "It is a Hugging Face model: name its folder." if to_original(unknown[0]) else "It is another model's file."
        )
        raise UnsupportedError(f"{file} holds {unknown[0]}, which the original LLaMA does not have.", hint)
    return tensors


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Parts hold the same tensors, of the same types."""
    odd = sorted(set(first.tensors) ^ set(other.tensors))
    if odd:
        raise CorruptFileError(
            f"{first.path.name} and {other.path.name} do not hold the same tensors: {odd[0]} is only in one of them.",
            "Take all parts from one checkpoint.",
        )
    for name, stored in first.tensors.items():
        if other.tensors[name].dtype != stored.dtype:
            raise CorruptFileError(
                f"{name} is {stored.dtype} in {first.path.name}, but {other.tensors[name].dtype} in {other.path.name}.",
                "Take all parts from one checkpoint.",
            )


def _whole_shapes(folder: Path, parts: Sequence[Checkpoint]) -> dict[str, tuple[int, ...]]:
    """Shapes of the joined tensors. Raises CorruptFileError where slices do not fit together."""
    first = parts[0].tensors
    needed = [NORM, EMBEDDINGS, "layers.0.feed_forward.w1.weight", *(f"layers.0.attention.w{x}.weight" for x in "qk")]
    lacking = [name for name in needed if name not in first]
    if lacking:
        raise CorruptFileError(f"{folder} lacks {lacking[0]}.", "Fetch the parts again.")
    axis = _embedding_axis(parts)
    return {name: _whole_shape(name, [part.tensors[name].shape for part in parts], axis) for name in first}


def _embedding_axis(parts: Sequence[Checkpoint]) -> Literal[0, 1]:
    """Whether parts divide the embeddings by rows (Llama 3) or by columns: a whole row is as long as the norm."""
    tensors = parts[0].tensors
    return 0 if tensors[EMBEDDINGS].shape[1:] == tensors[NORM].shape else 1


def _whole_shape(name: str, shapes: Sequence[tuple[int, ...]], embedding_axis: Literal[0, 1]) -> tuple[int, ...]:
    axis = layout(name, embedding_axis).axis
    if axis is None:
        fits = len(set(shapes)) == 1
        whole = shapes[0]
    else:
        fits = {len(shape) for shape in shapes} == {2} and len({shape[1 - axis] for shape in shapes}) == 1
        total = sum(shape[axis] for shape in shapes) if fits else 0
        whole = (total, shapes[0][1]) if axis == 0 else (shapes[0][0], total)
    if not fits:
        raise CorruptFileError(
            f"The parts of {name} do not fit together: {', '.join(map(str, shapes))}.",
            "Take all parts from one checkpoint.",
        )
    return whole


def _copies(found: Architecture, parts: int) -> int:
    """How many parts hold the same key-value head."""
    return parts // found.kv_heads if parts > found.kv_heads and parts % found.kv_heads == 0 else 1


def _without_copies(shapes: Shapes, found: Architecture, parts: int) -> Shapes:
    """Shapes of the joined tensors with each key-value head once."""
    copies, axis = _copies(found, parts), found.embedding_axis
    return {
        name: (shape[0] // copies, *shape[1:]) if layout(name, axis).repeated else shape
        for name, shape in shapes.items()
    }


def _check_count(folder: Path, parts: int, shapes: Shapes) -> None:
    """A missing last part shows in the attention's rows, which should be as many as the model is wide."""
    there, hidden = shapes["layers.0.attention.wq.weight"][0], shapes[NORM][0]
    if there < hidden:
        needed = -(-hidden * parts // there)
        raise CorruptFileError(
            f"{folder} has {parts} of {needed} parts: together they hold {there} of the {hidden} rows of"
            " layers.0.attention.wq.weight.",
            f"Fetch consolidated.{parts:02}.pth to consolidated.{needed - 1:02}.pth.",
        )


def _join(name: str, parts: Sequence[Checkpoint], found: Architecture) -> PlannedTensor:
    """A whole tensor from the parts, with Hugging Face's name and order of rows."""
    slices = [copied(part, name) for part in parts]
    shape, lies = found.shape(name), layout(name, _embedding_axis(parts))
    new_name = to_hf(name)
    assert new_name is not None
    if lies.axis is None or (len(parts) == 1 and lies.rotary is None):
        return replace(slices[0], name=new_name)
    files = parts[0].path.name if len(parts) == 1 else f"{parts[0].path.name} … {parts[-1].path.name}"
    if lies.repeated:
        copies = _copies(found, len(parts))
        slices = [_agreed(slices[number : number + copies]) for number in range(0, len(parts), copies)]
    return PlannedTensor(new_name, slices[0].dtype, shape, partial(_joined, slices, lies, found), f"{files}: {name}")


def _joined(slices: Sequence[PlannedTensor], lies: Layout, found: Architecture) -> Iterable[Buffer]:
    if lies.axis == 1:
        return beside([each.chunks() for each in slices], [row_size(each) for each in slices])
    chunks = chain.from_iterable(each.chunks() for each in slices)
    return chunks if lies.rotary is None else halves(chunks, found.head_dim, row_size(slices[0]))


def _agreed(slices: Sequence[PlannedTensor]) -> PlannedTensor:
    """The slice that several parts hold. Raises CorruptFileError, when it is read, where they do not hold the same."""
    if len(slices) == 1:
        return slices[0]

    def chunks() -> Iterator[Buffer]:
        for pieces in zip(*(each.chunks() for each in slices), strict=True):
            if any(piece != pieces[0] for piece in pieces[1:]):
                raise CorruptFileError(
                    f"{slices[0].origin} and {slices[-1].origin} differ, but hold the same key-value head.",
                    "Take all parts from one checkpoint.",
                )
            yield pieces[0]

    return replace(slices[0], chunks=chunks, copy_of=None)


# ---- writing ------------------------------------------------------------------------------------------------------


def pth_files(tensors: Sequence[PlannedTensor], config: Mapping[str, Any], parts: int = 1) -> tuple[PlannedFile, ...]:
    """Lay tensors with Hugging Face names out as `consolidated.NN.pth`; `config` is their `config.json`.

    Parts are written one after the other, and each takes what it needs of every tensor: the rows of a plain copy are
    read once in all, but the columns of `wo`, `w2` (and of the embeddings before Llama 3) take reading the tensor
    once for each part, and a computed tensor is computed once for each part. Nothing is kept meanwhile.
    Raises UnsupportedError for a model that `.pth` cannot express, CorruptFileError for tensors that are no whole
    model, UsageError for a number of parts that does not divide its heads.
    """
    whole, found = _originals(tensors, config)
    _check_parts(found, parts)
    order = names(found.layers)
    return tuple(
        PlannedFile(
            f"consolidated.{number:02}.pth",
            "torch",
            tuple(_slice(name, whole[name], number, parts, found) for name in order),
        )
        for number in range(parts)
    )


def pth_params(tensors: Sequence[PlannedTensor], config: Mapping[str, Any]) -> bytes:
    """The `params.json` that goes beside `pth_files` of the same tensors."""
    _, found = _originals(tensors, config)
    return json.dumps(to_params(found)).encode() + b"\n"


def architecture_of(tensors: Sequence[PlannedTensor], config: Mapping[str, Any]) -> Architecture:
    """What model tensors with Hugging Face names make up. Raises as `pth_files` does."""
    return _originals(tensors, config)[1]


def _originals(
    tensors: Sequence[PlannedTensor], config: Mapping[str, Any]
) -> tuple[dict[str, PlannedTensor], Architecture]:
    """Whole tensors by original name, still with Hugging Face's order of rows."""
    by_name = {tensor.name: tensor for tensor in tensors if not is_buffer(tensor.name)}
    tied = config.get("tie_word_embeddings") is not False
    if HF_OUTPUT not in by_name and HF_EMBEDDINGS in by_name and tied:
        by_name[HF_OUTPUT] = replace(by_name[HF_EMBEDDINGS], name=HF_OUTPUT)
    kind = (config.get("architectures") or [config.get("model_type", "model")])[0]
    whole: dict[str, PlannedTensor] = {}
    for name, tensor in by_name.items():
        original = to_original(name)
        if original is None:
            raise UnsupportedError(
                f"This {kind} has {name}, for which the original LLaMA layout has no place.",
                "Keep it as a Hugging Face folder, or export it to GGUF: calpaca models export",
            )
        if tensor.dtype not in _FLOATS:
            raise UnsupportedError(f"{name} is {tensor.dtype}; a .pth checkpoint holds {', '.join(_FLOATS)}.", "")
        whole[original] = tensor
    shapes = {name: tensor.shape for name, tensor in whole.items()}
    lacking = [name for name in (NORM, EMBEDDINGS, "layers.0.feed_forward.w1.weight") if name not in shapes]
    if lacking:
        raise CorruptFileError(f"The {kind} lacks {to_hf(lacking[0])}.", "Fetch the missing files.")
    found = from_config(config, shapes, f"The {kind}")
    check_shapes(found, shapes, f"The {kind}")
    return whole, found


def _check_parts(found: Architecture, parts: int) -> None:
    """Each part gets as many heads as the others, and whole key-value heads: its own, or one that it shares."""
    possible = [
        n for n in range(1, found.heads + 1) if found.heads % n == 0 and 0 in {found.kv_heads % n, n % found.kv_heads}
    ]
    if parts not in possible:
        raise UsageError(
            f"{parts} parts cannot share {found.heads} heads and {found.kv_heads} key-value heads evenly.",
            f"Use --parts with one of {', '.join(map(str, possible))}.",
        )


def _slice(name: str, tensor: PlannedTensor, number: int, parts: int, found: Architecture) -> PlannedTensor:
    """What part `number` holds of a tensor."""
    lies = layout(name, found.embedding_axis)
    if lies.axis is None or (parts == 1 and lies.rotary is None):
        return replace(tensor, name=name)
    copies = _copies(found, parts) if lies.repeated else 1
    start, stop = _bounds(tensor.shape[lies.axis], parts // copies)[number // copies]
    make: Callable[[], Iterable[Buffer]]
    if lies.axis == 1:
        item = SIZES[tensor.dtype]
        make = partial(_columns, tensor, start * item, stop * item)
        shape: tuple[int, ...] = (tensor.shape[0], stop - start)
    else:
        head_dim = found.head_dim if lies.rotary is not None else None
        make = partial(_rows, tensor, start, stop, head_dim)
        shape = (stop - start, *tensor.shape[1:])
    of = f" ({number + 1} of {parts})" if parts > 1 else ""
    return PlannedTensor(name, tensor.dtype, shape, make, f"{tensor.origin}{of}", tensor.memory)


def _bounds(length: int, parts: int) -> list[tuple[int, int]]:
    """Equal shares, the rest to the last part, as the merge scripts of Chinese-LLaMA-Alpaca cut `output.weight`."""
    share = length // parts
    return list(pairwise(accumulate([*[share] * (parts - 1), length - share * (parts - 1)], initial=0)))


def _columns(tensor: PlannedTensor, start: int, stop: int) -> Iterable[Buffer]:
    return columns(tensor.chunks(), row_size(tensor), start, stop)


def _rows(tensor: PlannedTensor, start: int, stop: int, head_dim: int | None) -> Iterable[Buffer]:
    chunks = rows(tensor, start, stop)
    return chunks if head_dim is None else pairs(chunks, head_dim, row_size(tensor))
