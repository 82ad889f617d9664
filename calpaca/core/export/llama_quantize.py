"""llama.cpp's own quantizer, for the types that no Python package makes (k-quants)."""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from calpaca.core.checkpoint.gguf_file import ALIGNMENT
from calpaca.core.checkpoint.plan import PlannedFile, PlannedTensor
from calpaca.core.errors import ModelError
from calpaca.core.export.check import failed
from calpaca.core.export.gguf_types import gguf
from calpaca.core.gguf import check, spans

logger = logging.getLogger("calpaca")

PROGRAM = "llama-quantize"
_CHUNK = 16 << 20  # bytes that are copied at a time


def find_quantizer() -> Path | None:
    """The program, if it is on the PATH."""
    found = shutil.which(PROGRAM)
    return Path(found) if found else None


def quantize(program: Path, source: Path, target: Path, kind: str) -> None:
    """Quantize a GGUF file. Raises ModelError with what the program said last."""
    logger.info("Running %s for %s.", program, kind)
    try:
        done = subprocess.run(  # noqa: S603  # the program was looked up, its arguments are ours
            [program, source, target, kind.upper()], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise ModelError(f"{program} cannot be started: {error}.", "Install llama.cpp anew.") from error
    if done.returncode or not target.is_file():
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ModelError(
            f"{program} failed with exit code {done.returncode}: {said[-1] if said else 'it said nothing'}.",
            f"Run it by hand on an f16 export, or take a plain type. Arguments were: IN OUT {kind.upper()}",
        )


def copied_file(file: Path, name: str) -> PlannedFile:
    """A GGUF file as it is, to be written again with digests. Raises CorruptFileError, or ModelError for an odd layout."""
    header = check(file)
    places = spans(file)
    types = gguf().GGMLQuantizationType
    ordered = sorted(header.tensors, key=lambda tensor: tensor.offset)
    end = header.data_start
    tensors = []
    for tensor in ordered:
        start, size = places[tensor.name]
        if start != end:
            raise failed(f"{tensor.name} begins at byte {start:,} instead of {end:,}")
        end = start + size + -size % ALIGNMENT
        tensors.append(
            PlannedTensor(
                tensor.name, str(types(tensor.type).name), tensor.shape[::-1],
                partial(_bytes, file, start, size),
                f"{PROGRAM}: {tensor.name}", packed=size,
            )
        )  # fmt: skip
    with file.open("rb") as opened:
        return PlannedFile(name, "gguf", tuple(tensors), opened.read(header.data_start))


def _bytes(file: Path, start: int, size: int) -> Iterator[bytes]:
    with file.open("rb") as opened:
        opened.seek(start)
        while size:
            chunk = opened.read(min(_CHUNK, size))
            size -= len(chunk)
            yield chunk
