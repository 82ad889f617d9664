"""The GGUF container: a header that the `gguf` package made, then tensors, each on a multiple of 32 bytes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Sequence

from calpaca.core.checkpoint.plan import PlannedTensor
from calpaca.core.checkpoint.stream import FileStream

ALIGNMENT = 32
"""Bytes; the format's own where a file states no other."""


def write(stream: FileStream, tensors: Sequence[PlannedTensor], header: bytes) -> None:
    """Write a whole file. `header` announces exactly these tensors, in this order."""
    stream.write(header + bytes(-len(header) % ALIGNMENT))
    for tensor in tensors:
        stream.write_tensor(tensor)
        stream.write(bytes(-tensor.size % ALIGNMENT))
