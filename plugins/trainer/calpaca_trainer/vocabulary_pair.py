"""Whether a tokenizer belongs to a model that is to learn, told from headers before any data is read."""

from __future__ import annotations

from pathlib import Path

from calpaca.core.errors import ModelError
from calpaca.core.files import ModelFiles
from calpaca.core.merge.base_model import read_base
from calpaca.core.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


def check_vocabularies(files: ModelFiles, tokenizer: Tokenizer) -> None:
    """Raises ModelError, with the sizes and the fix, for a tokenizer with more tokens than the model has embedding rows, and
    for one that was named in place of the model's own and has fewer tokens than that.

    A model may have more rows than tokens: many are filled up to a round number. What adapters carry is checked with them.
    """
    rows, size = _rows(files.weights), len(tokenizer)
    if rows is not None and size > rows and not files.adapters:
        raise ModelError(
            f"The tokenizer in {files.tokenizer} has {size} tokens, but {files.name} only {rows} embedding rows.",
            "Leave --tokenizer away, or give the model rows for the new tokens first: calpaca vocab merge --model.",
        )
    own = _own_tokenizer(files)
    if own is None or own == files.tokenizer:
        return
    known = len(load_tokenizer(own))
    if size < known:
        raise ModelError(
            f"The tokenizer in {files.tokenizer} has {size} tokens, but the model's own, in {own}, has {known}: it would"
            f" learn to do without {known - size} of its tokens.",
            "Leave --tokenizer away.",
        )


def _rows(weights: Path) -> int | None:
    """Embedding rows of a model; None where it has none that are known."""
    base = read_base(weights)
    return base.tensors[base.embedding].shape[0] if base.embedding is not None else None


def _own_tokenizer(files: ModelFiles) -> Path | None:
    """The folder of the tokenizer that is taken when none is named."""
    folders = (*(adapter.path for adapter in reversed(files.adapters)), files.weights)
    return next((folder for folder in folders if has_tokenizer(folder)), None)
