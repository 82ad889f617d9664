"""Rows of training files: JSON, JSONL, CSV, Parquet and plain text, each with the line it stands in."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calpaca_trainer.errors import DataError

UNITS = ("line", "document")
"""What is one text of a plain text file."""


@dataclass(frozen=True)
class Row:
    """One row: its values by column, and where it stands. `line` counts from 1; in Parquet it counts rows."""

    file: Path
    line: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Fault:
    """A row that cannot be used, and why."""

    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def read_rows(file: Path, unit: str = "document") -> Iterator[Row | Fault]:
    """All rows of a file, in order; what is no row comes as a fault. `unit` is for plain text: `line` or `document`.

    Raises DataError for a file that cannot be read at all.
    """
    read = _READERS.get(file.suffix.lower())
    if read is None:
        raise DataError(f"{file} is of no kind that can be trained on.", f"Known: {', '.join(_READERS)}.")
    try:
        yield from _text(file, unit) if read is _documents else read(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}.", "It must be a readable file in UTF-8.") from error


def find_files(path: Path) -> list[Path]:
    """The training files of a folder and all below it, sorted; or the one file. Raises DataError when there is none."""
    if path.is_file():
        return [path]
    files = sorted(each for each in path.rglob("*") if each.suffix.lower() in _READERS and each.is_file())
    if not files:
        what = "holds no training file" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {what}.", f"Name a file or folder of {', '.join(_READERS)}.")
    return files


def _json(file: Path) -> Iterator[Row | Fault]:
    """A list of objects, or one object a line under the name of JSON."""
    text = file.read_text(encoding="utf-8-sig")
    start = len(text) - len(text.lstrip())
    if not text.startswith("[", start):
        yield from _jsonl(file)
        return
    decoder, position, line, counted = json.JSONDecoder(), start + 1, 1, 0
    while True:
        position = _skip(text, position, " \t\r\n,")
        if position >= len(text) or text[position] == "]":
            if position >= len(text):
                yield Fault(file, text.count("\n") + 1, "the list has no end: the file is truncated")
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError as error:
            yield Fault(file, line, f"no valid JSON from here on: {error}")
            return
        yield _row(file, line, value)


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _jsonl(file: Path) -> Iterator[Row | Fault]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _row(file, number, json.loads(line))
            except ValueError as error:
                yield Fault(file, number, f"no valid JSON: {error}")


def _row(file: Path, line: int, value: Any) -> Row | Fault:
    if isinstance(value, dict):
        return Row(file, line, value)
    return Fault(file, line, f"an object is wanted, this is a {type(value).__name__}")


def _csv(file: Path) -> Iterator[Row | Fault]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, dialect="excel-tab" if file.suffix.lower() == ".tsv" else "excel")
        line = reader.line_num + 1 if reader.fieldnames else 1
        for values in reader:
            if None in values:
                yield Fault(file, line, f"{len(values[None])} values more than the header has columns")
            else:
                yield Row(file, line, values)
            line = reader.line_num + 1  # a value may hold line breaks


def _parquet(file: Path) -> Iterator[Row | Fault]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f"{file} needs the package 'pyarrow', which is not installed.",
            "Install it with: pip install 'calpaca-trainer[parquet]'",
        ) from error
    try:
        with parquet.ParquetFile(file) as opened:
            numbers = iter(range(1, opened.metadata.num_rows + 1))
            for batch in opened.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    yield Row(file, next(numbers), values)
    except ArrowInvalid as error:
        raise DataError(f"{file} is no Parquet file: {error}.", "Fetch the file again.") from error


def _documents(file: Path) -> Iterator[Row | Fault]:
    yield from _text(file, "document")


def _text(file: Path, unit: str) -> Iterator[Row]:
    if unit == "document":
        yield Row(file, 1, {"text": file.read_text(encoding="utf-8-sig")})
        return
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Row(file, number, {"text": line.rstrip("\r\n")})


_READERS: Mapping[str, Callable[[Path], Iterator[Row | Fault]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _documents,
}
