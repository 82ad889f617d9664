"""What requests are made of: seeds, passages of documents and instructions, read before any model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calpaca.core.encoding import decode
from calpaca.core.errors import UsageError
from calpaca.core.instructions import Instruction, read_instructions
from calpaca.core.registry import Component, Registry
from calpaca_crawl.methods import Passage

_PASSAGE_WORDS = 300
"""Words (in Chinese, characters) of a passage: enough for several questions, and room for them in a small context."""


def read_seed_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file. Raises UsageError that names the line that is none."""
    rows = []
    for number, line in enumerate(_text(path, "--seeds").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}:{number} is not valid JSON: {error}.", "Each line must be one row.") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number} is no row but {line[:40]}.", "Each line must be one JSON object.")
        rows.append(row)
    return rows


def read_asked(path: Path) -> list[Instruction]:
    """The instructions of a text, JSON or JSONL file."""
    return read_instructions(_text(path, "--data-file"), str(path))


def read_passages(paths: Sequence[Path], loaders: Registry[Component]) -> list[Passage]:
    """All documents, cut at sentences. Raises DocumentError for what cannot be read."""
    from calpaca.core.text_measures import words
    from calpaca.documents.loaders import find_files, load_file
    from calpaca.documents.splitter import SentenceSplitter

    splitter = SentenceSplitter(lambda texts: [len(words(text)) for text in texts], _PASSAGE_WORDS, 0)
    return [
        Passage(str(chunk.metadata.get("source") or file), chunk.page_content, int(chunk.metadata["start"]))
        for file in find_files(paths, loaders)
        for chunk in splitter.split_documents(load_file(file, loaders))
    ]


def _text(path: Path, flag: str) -> str:
    try:
        return decode(path.expanduser().read_bytes(), str(path))[0]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", f"Check {flag}.") from error
