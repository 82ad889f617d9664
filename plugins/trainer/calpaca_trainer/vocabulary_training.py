"""Training a SentencePiece vocabulary on texts of any size, in bounded memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calpaca.core.errors import UsageError
from calpaca_trainer.errors import DataError

_LONGEST = 4000  # bytes; SentencePiece leaves out sentences of more than 4192


@dataclass(frozen=True)
class VocabularyOptions:
    """The defaults are those of Chinese-LLaMA's 20,000 pieces. `sentences` is how many are kept in memory, drawn at
    random from all; `byte_fallback` writes characters without a piece as bytes."""

    size: int = 20_000
    kind: Literal["unigram", "bpe"] = "unigram"
    coverage: float = 0.9995
    sentences: int = 2_000_000
    byte_fallback: bool = False
    normalization: Literal["nmt_nfkc", "nfkc", "identity"] = "nmt_nfkc"
    threads: int = 1


def train_vocabulary(corpus: Sequence[Path], options: VocabularyOptions) -> bytes:
    """A SentencePiece model. Raises DataError for texts that cannot be read, UsageError for a size that is impossible."""
    from sentencepiece import SentencePieceTrainer

    read = _Sentences(text_files(corpus))
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(read),
            model_writer=model,
            model_type=options.kind,
            vocab_size=options.size,
            character_coverage=options.coverage,
            input_sentence_size=options.sentences,
            shuffle_input_sentence=True,
            byte_fallback=options.byte_fallback,
            normalization_rule_name=options.normalization,
            num_threads=options.threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        if read.error is not None:
            raise read.error from None
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]  # after the source of the check that failed
        raise UsageError(
            f"SentencePiece cannot make {options.size} pieces of these texts: {reason}",
            "Choose another --vocab-size, or name more text.",
        ) from error
    return model.getvalue()


class _Sentences:
    """The sentences of files, and the error that ended them: SentencePiece makes a text of it."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self.error: DataError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from sentences(self._files)
        except DataError as error:
            self.error = error
            raise


def text_files(corpus: Sequence[Path]) -> list[Path]:
    """The files named, and the `.txt` and `.md` files below the folders named, sorted. Raises DataError for none."""
    files: list[Path] = []
    for path in corpus:
        below = sorted(file for file in path.rglob("*") if file.suffix in {".txt", ".md"}) if path.is_dir() else [path]
        if not below or not all(file.is_file() for file in below):
            raise DataError(f"{path} holds no text.", "Name text files, or folders with .txt or .md files.")
        files += below
    return files


def sentences(files: Sequence[Path]) -> Iterator[str]:
    """Every line that is not blank; longer ones in pieces that SentencePiece takes. Raises DataError with file and line."""
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = line.decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"Line {number} of {file} is no UTF-8: {error.reason}.", "Save the file as UTF-8."
                    ) from error
                yield from _pieces(text)


def _pieces(text: str) -> Iterator[str]:
    while text:
        length = len(text.encode("utf-8")[:_LONGEST].decode("utf-8", errors="ignore"))
        yield text[:length]
        text = text[length:]
