"""The files of a run: rows, rejected records, report and picture, side by side and each whole or not there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calpaca.core.errors import JobError, UsageError
from calpaca.core.paths import atomic_file


@dataclass(frozen=True)
class Output:
    """`rows` is what the person named; the others stand beside it."""

    rows: Path

    @property
    def rejected(self) -> Path:
        return self.rows.with_suffix(".rejected.jsonl")

    @property
    def report(self) -> Path:
        return self.rows.with_suffix(".report.json")

    @property
    def picture(self) -> Path:
        return self.rows.with_suffix(".report.png")

    def check(self, pool: str) -> None:
        """Raise UsageError where the file holds the rows of another run: these are not replaced unasked."""
        if self.rows.is_dir():
            raise UsageError(f"{self.rows} is a folder.", "Name a file for the rows.")
        if self.rows.exists() and self._pool() != pool:
            raise UsageError(
                f"{self.rows} holds the rows of another run: other models, prompts or options.",
                "Name another file, or say --overwrite.",
            )

    def _pool(self) -> str | None:
        try:
            return str(json.loads(self.report.read_text("utf-8"))["pool"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(
        self, rows: Iterable[Mapping[str, Any]], rejected: Iterable[Mapping[str, Any]], figures: Mapping[str, Any]
    ) -> None:
        """Write the files. Raises JobError when the disk is full or cannot be written."""
        try:
            _write(self.rows, rows)
            _write(self.rejected, rejected)
            with atomic_file(self.report) as unfinished:
                unfinished.write_text(json.dumps(figures, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise JobError(
                f"{self.rows} cannot be written: {error.strerror or error}.",
                "Free some space or name another place; the replies are kept: give the same command again.",
            ) from error


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
