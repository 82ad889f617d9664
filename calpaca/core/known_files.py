"""What a file is, whatever it is called: by its published sha256, else by what its header says."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

from calpaca.core.checkpoint.dtypes import NAMES
from calpaca.core.checkpoint.reader import read_file
from calpaca.core.errors import CorruptFileError, ModelNotFoundError
from calpaca.core.fingerprint import file_digest
from calpaca.core.tokenizer import SentencePieceTokenizer

_TORCH = {".pth", ".bin", ".pt"}


@dataclass(frozen=True)
class FileCard:
    """A single file. `known` is what the published sums say; `tokens` is set for a tokenizer, the rest for weights.

    None where the file does not say, or PyTorch would be needed to read it and is not installed.
    """

    path: Path
    size: int
    sha256: str
    known: str | None
    tensors: int | None = None
    parameters: int | None = None
    dtype: str | None = None
    tokens: int | None = None

    @property
    def remark(self) -> str | None:
        """What a missing entry means."""
        if self.known is not None:
            return None
        if self.path.suffix in _TORCH:
            return (
                "No known file. For a file that PyTorch wrote that proves nothing: its sum also depends on the version"
                " that wrote it. Compare its tensors: calpaca models verify DIR --against OTHER"
            )
        return "No known file."


def identify(sha256: str) -> str | None:
    """The published file with this digest, such as `tokenizer.model of LLaMA and Llama 2 by Meta`."""
    return _known().get(sha256)


@cache
def _known() -> Mapping[str, str]:
    text = resources.files("calpaca.core").joinpath("known_files.toml").read_text("utf-8")
    return {file["sha256"]: f"{file['name']} of {file['model']}" for file in tomllib.loads(text)["file"]}


def read_file_card(path: Path) -> FileCard:
    """Describe a `.pth`, `.bin`, `.safetensors` or `tokenizer.model`, or identify any other file.

    Raises ModelNotFoundError when there is none, CorruptFileError for damaged weights or pickled code.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"{path} does not exist.", "Check the path.")
    digest = file_digest(path)
    card = FileCard(path, path.stat().st_size, digest, identify(digest))
    if path.suffix == ".safetensors" or path.suffix in _TORCH:
        return _with_tensors(card)
    return _with_tokens(card) if path.suffix == ".model" else card


def _with_tensors(card: FileCard) -> FileCard:
    try:
        tensors = read_file(card.path)
    except ModuleNotFoundError:  # without PyTorch its own files cannot be read
        return card
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.elements
    dtype = NAMES.get(counts.most_common(1)[0][0]) if counts else None
    return replace(card, tensors=len(tensors), parameters=counts.total(), dtype=dtype)


def _with_tokens(card: FileCard) -> FileCard:
    try:
        return replace(card, tokens=len(SentencePieceTokenizer(card.path, {}, {})))
    except (ModuleNotFoundError, CorruptFileError):  # Llama 3's is of another kind under the same name
        return card
