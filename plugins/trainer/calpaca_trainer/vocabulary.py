"""Merging SentencePiece vocabularies, as Chinese-LLaMA's was made: what is there stays, new pieces come behind it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calpaca.core.errors import CorruptFileError, MissingExtraError, ModelNotFoundError, UsageError

SPACE = "▁"
_CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_HTML = re.compile(r"[<>]|&#?\w*;?|https?|www\.|\w=\"")

FILTERS: Mapping[str, Callable[[str], bool]] = {
    "digits": lambda piece: piece.removeprefix(SPACE).isdigit(),
    "html": lambda piece: _HTML.search(piece) is not None,
    "non-cjk": lambda piece: _CJK.search(piece) is None,
    "space": lambda piece: piece.startswith(SPACE),
}
"""What pieces a filter leaves out: digit strings (LLaMA has a token per digit), remains of web pages, pieces without an
ideograph, pieces that begin with a space."""


@dataclass(frozen=True)
class MergedVocabulary:
    """`data` is the `tokenizer.model`; `added` are the new pieces in order, `known` counts those that were there, and
    `left_out` those that a filter took."""

    data: bytes
    added: tuple[str, ...]
    known: int
    left_out: Mapping[str, int]

    def traits(self) -> dict[str, int]:
        """How many of the new pieces each filter would take."""
        return {name: sum(map(takes, self.added)) for name, takes in FILTERS.items()}


def read_pieces(model: Path) -> Any:
    """The `ModelProto` of a SentencePiece file, or of a folder's `tokenizer.model`.

    Raises ModelNotFoundError, UsageError for a tokenizer of another kind, CorruptFileError for what is no such model.
    """
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ModuleNotFoundError as error:
        raise MissingExtraError("A SentencePiece vocabulary", "torch", error.name or "sentencepiece") from error
    file = model / "tokenizer.model" if model.is_dir() else model
    if model.is_dir() and not file.is_file() and (model / "tokenizer.json").is_file():
        raise UsageError(
            f"The tokenizer in {model} is no SentencePiece model but one of another kind (tokenizer.json).",
            "A vocabulary of SentencePiece's is what is trained, merged and measured, as LLaMA's and Mistral's first are.",
        )
    if not file.is_file():
        raise ModelNotFoundError(f"{file} does not exist.", "Name a SentencePiece model, or a folder with one.")
    try:
        SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise CorruptFileError(f"{file} is no SentencePiece model.", "Name a SentencePiece model.") from error
    return sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())


def merge_vocabularies(
    base: Any, added: Iterable[str], *, filters: Sequence[str] = (), tokens: Sequence[str] = ()
) -> MergedVocabulary:
    """Append the pieces that `base` (a `ModelProto`) does not have, in their order, then `tokens`, such as `[PAD]`.

    New pieces get the score 0.0, above every score of a trained BPE vocabulary, and no type; what the base says of its
    training and normalisation stays. That fixes every byte of the file.
    Source: scripts/merge_tokenizer/merge_tokenizers.py of Chinese-LLaMA-Alpaca.
    """
    merged = type(base)()
    merged.CopyFrom(base)
    there = {piece.piece for piece in base.pieces}
    left_out: Counter[str] = Counter()
    new: dict[str, None] = {}
    known = 0
    for piece in added:
        reason = next((name for name in filters if FILTERS[name](piece)), None)
        if piece in there:
            known += 1
        elif reason is not None:
            left_out[reason] += 1
        else:
            new[piece] = None
    _check_tokens(tokens, there | set(new))
    for piece in (*new, *tokens):
        merged.pieces.add(piece=piece, score=0.0)
    return MergedVocabulary(merged.SerializeToString(), (*new, *tokens), known, dict(left_out))


def _check_tokens(tokens: Sequence[str], there: set[str]) -> None:
    for token in tokens:
        if token in there:
            raise UsageError(f"The vocabulary has '{token}' already.", "Leave --add-token away.")


def old_pieces(base: Any, added: Sequence[str]) -> list[list[int]]:
    """For each new piece the ids of the pieces that `base` writes it with."""
    from sentencepiece import SentencePieceProcessor

    plain = type(base)()
    plain.CopyFrom(base)
    plain.normalizer_spec.add_dummy_prefix = False  # a piece stands inside a text
    processor = SentencePieceProcessor(model_proto=plain.SerializeToString())
    ids: list[list[int]] = processor.encode([piece.replace(SPACE, " ") for piece in added])
    return ids
