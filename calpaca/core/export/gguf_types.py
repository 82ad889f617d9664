"""Number formats of GGUF files: which type each tensor gets, and rows of numbers packed into it.

The rules are those of llama.cpp's converter (`--outtype`), so that `f16`, `bf16` and `q8_0` files equal what it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from calpaca.core.errors import MissingExtraError, UnsupportedError, UsageError, unknown_name

Rows = np.ndarray[Any, np.dtype[np.float32]]

K_QUANTS = (
    "q2_k", "q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
"""Types that only llama.cpp's own quantizer makes."""

_HALF = 2**-11  # relative error of rounding to float16


@dataclass(frozen=True)
class PlainType:
    """A type that the `gguf` package writes. `ggml` is its name there and `file_type` that of a whole file.

    `error` bounds how far a number moves, in parts of the largest one in its block of `block` numbers; 0 where a number
    is only rounded.
    """

    name: str
    ggml: str
    file_type: str
    block: int = 1
    error: float = 0.0

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor."""
        block, size = gguf().GGML_QUANT_SIZES[self.number]
        return prod(shape) // int(block) * int(size)

    @property
    def number(self) -> Any:
        """The member of ggml's enumeration."""
        return gguf().GGMLQuantizationType[self.ggml]

    def pack(self, rows: Rows) -> bytes:
        """The bytes of float32 [rows, columns]."""
        data: bytes = gguf().quants.quantize(rows, self.number).tobytes()
        return data

    def unpack(self, data: Any) -> Rows:
        """float32 [rows, columns] of bytes [rows, …], as llama.cpp would compute with them."""
        rows: Rows = gguf().quants.dequantize(data, self.number)
        return rows


_TYPES = (
    PlainType("f32", "F32", "ALL_F32"),
    PlainType("f16", "F16", "MOSTLY_F16"),
    PlainType("bf16", "BF16", "MOSTLY_BF16"),
    PlainType("q8_0", "Q8_0", "MOSTLY_Q8_0", 32, 0.5 / 127 + _HALF),
    PlainType("q5_1", "Q5_1", "MOSTLY_Q5_1", 32, 2 * (0.5 / 31 + _HALF)),  # between smallest and largest: two of them
    PlainType("q5_0", "Q5_0", "MOSTLY_Q5_0", 32, 1 / 16 + _HALF),  # one end of its range is a step short
    PlainType("q4_1", "Q4_1", "MOSTLY_Q4_1", 32, 2 * (0.5 / 15 + _HALF)),
    PlainType("q4_0", "Q4_0", "MOSTLY_Q4_0", 32, 1 / 8 + _HALF),
    PlainType("tq2_0", "TQ2_0", "MOSTLY_TQ2_0", 256, 0.5 + _HALF),
    PlainType("tq1_0", "TQ1_0", "MOSTLY_TQ1_0", 256, 0.5 + _HALF),
)

PLAIN: Mapping[str, PlainType] = {each.name: each for each in _TYPES}
"""By the name that `--type` takes, from the most exact to the smallest. The last two are for ternary models."""

_TERNARY = ("tq1_0", "tq2_0")
_COARSE = ("q4_0", "q4_1", "q5_0", "q5_1")
_ENDS = ("token_embd.weight", "output.weight")


def gguf() -> Any:
    """The `gguf` package. Raises MissingExtraError."""
    try:
        import gguf as package
        import gguf.quants
    except ModuleNotFoundError as error:
        raise MissingExtraError("A GGUF file", "torch", error.name or "gguf") from error
    return package


def plain_type(name: str) -> PlainType:
    """The type of this name. Raises UnsupportedError for an unknown one, and for one that only llama.cpp makes."""
    if name in PLAIN:
        return PLAIN[name]
    if name in K_QUANTS:
        raise UnsupportedError(
            f"Type {name} is only made by llama.cpp's own quantizer, and there is no llama-quantize on the PATH.",
            f"Install llama.cpp and put its llama-quantize on the PATH, or take a plain type: {', '.join(PLAIN)}.",
        )
    message, hint = unknown_name("GGUF type", name, (*PLAIN, *K_QUANTS))
    raise UsageError(message, hint)


def type_of(name: str, shape: tuple[int, ...], wanted: PlainType, *, tied: bool) -> PlainType:
    """The type of one tensor in a file of type `wanted`; `name` is the one in the file.

    Vectors stay float32, and rows that do not divide into blocks become float16. Files of 4 and 5 bits keep the output
    layer in 8: every program that quantizes leaves it finer than the rest.
    """
    if len(shape) == 1 or name.endswith("_norm.weight"):
        return PLAIN["f32"]
    if wanted.name in _TERNARY and name in _ENDS:
        return PLAIN["f16"]
    is_output = name == _ENDS[0] if tied else name == _ENDS[1]
    chosen = PLAIN["q8_0"] if wanted.name in _COARSE and is_output else wanted
    return chosen if shape[-1] % chosen.block == 0 else PLAIN["f16"]
