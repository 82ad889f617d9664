"""Number formats of tensors, by the codes that safetensors uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calpaca.core.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element."""

NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
"""The names that torch and configuration files use."""

_CODES = {name: code for code, name in NAMES.items()}


def to_torch(code: str) -> torch.dtype:
    """The dtype of a code. Raises UnsupportedError for one that torch does not have."""
    import torch

    if code not in NAMES:
        raise UnsupportedError(f"Tensors of type {code} cannot be read.", f"Known types: {', '.join(NAMES)}.")
    dtype: torch.dtype = getattr(torch, NAMES[code])
    return dtype


def code_of(dtype: torch.dtype | str) -> str:
    """The code of a torch dtype or of its name. Raises UnsupportedError for one that safetensors does not have."""
    name = str(dtype).removeprefix("torch.")
    if name not in _CODES:
        raise UnsupportedError(f"Tensors of type {name} cannot be written.", f"Known types: {', '.join(_CODES)}.")
    return _CODES[name]
