"""A GGUF file with its matrices in another type: dequantized and written again, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from calpaca.core import gguf
from calpaca.core.errors import MissingExtraError, ModelError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}
_WRITTEN_ANEW = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def matrix_types(path: Path) -> set[str]:
    """Names of the types that a file's matrices have. Raises CorruptFileError for a file that is not whole."""
    library = _library()
    matrices = [tensor for tensor in gguf.check(path).tensors if len(tensor.shape) > 1]
    return {library.GGMLQuantizationType(tensor.type).name for tensor in matrices}


def retype(source: Path, wanted: str, target: Path) -> None:
    """Write `source` again with matrices of the type `wanted` (F32, F16 or Q8_0); vectors are float32, as ever.

    Needs the memory of one tensor in float32. Raises ModelError for values that `wanted` cannot hold, UnsupportedError
    for a type that cannot be dequantized.
    """
    library = _library()
    reader = library.GGUFReader(source)
    writer = library.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith(_WRITTEN_ANEW):
            kind, *rest = field.types
            writer.add_key_value(field.name, field.contents(), kind, sub_type=rest[-1] if rest else None)
    writer.add_file_type(_FILE_TYPES[wanted])
    types = [library.GGMLQuantizationType[wanted if len(tensor.shape) > 1 else "F32"] for tensor in reader.tensors]
    for tensor, kind in zip(reader.tensors, types, strict=True):
        _announce(library, writer, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    progress = tqdm(reader.tensors, desc=source.name, unit="tensor", disable=None, leave=False)
    for tensor, kind in zip(progress, types, strict=True):
        writer.write_tensor_data(_values(library, tensor, kind))
    writer.close()


def _library() -> Any:
    try:
        import gguf as library
    except ModuleNotFoundError as error:
        raise MissingExtraError("Preparing a GGUF file", "torch", error.name or "gguf") from error
    return library


def _announce(library: Any, writer: Any, tensor: Any, kind: Any) -> None:
    import numpy as np

    shape = [int(length) for length in reversed(tensor.shape)]
    block, size = library.GGML_QUANT_SIZES[kind]
    writer.add_tensor_info(
        tensor.name, shape, np.dtype(np.float32), int(tensor.n_elements) // block * size, raw_dtype=kind
    )


def _values(library: Any, tensor: Any, kind: Any) -> NDArray[np.generic]:
    """The tensor's values in another type, as they lie in the file."""
    import numpy as np

    if tensor.tensor_type == kind:
        same: NDArray[np.generic] = tensor.data
        return same
    try:
        values = library.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        converted: NDArray[np.generic] = library.quantize(values, kind)
    except NotImplementedError as error:
        raise UnsupportedError(
            f"{tensor.name} has the type {tensor.tensor_type.name}, which cannot be dequantized.",
            "Use --engine llama_cpp, which reads every type.",
        ) from error
    if kind.name == "F16" and not np.isfinite(converted).all():
        raise ModelError(f"{tensor.name} has values that float16 cannot hold.", "Use --dtype float32.")
    return converted
