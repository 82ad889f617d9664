"""Token ids of data on disk, keyed by everything they depend on, and read without loading them."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calpaca.core.disk import disk_errors
from calpaca.core.jobs import step_key
from calpaca.core.lock import exclusive
from calpaca.core.paths import atomic_folder, cache_dir
from calpaca_trainer.rendering import Example
from calpaca_trainer.rows import Fault

if TYPE_CHECKING:
    import numpy as np

_FORMAT = 1  # a change in how rows are read or rendered makes older caches void


@dataclass(frozen=True)
class TokenCache:
    """Examples of one file, in its order: ids, marks of those that are learnt, and the line each came from."""

    folder: Path
    file: Path

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Counts and faults, as they were when the file was read."""
        facts: dict[str, Any] = json.loads((self.folder / "facts.json").read_text("utf-8"))
        return facts

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every example."""
        import numpy as np

        return np.diff(self._offsets)

    @cached_property
    def learnt(self) -> np.ndarray:
        """Tokens of every example that count in the loss."""
        import numpy as np

        marks, starts = np.asarray(self._marks), self._offsets[:-1]
        if not len(starts):
            return np.zeros(0, dtype=np.int64)
        counts: np.ndarray = (
            np.add.reduceat(marks, starts, dtype=np.int64) - marks[starts]
        )  # nothing predicts the first
        return counts

    def ids(self, number: int) -> np.ndarray:
        """Token ids, int32."""
        ids: np.ndarray = self._ids[self._offsets[number] : self._offsets[number + 1]]
        return ids

    def marks(self, number: int) -> np.ndarray:
        """Which tokens are learnt, bool."""
        marks: np.ndarray = self._marks[self._offsets[number] : self._offsets[number + 1]]
        return marks

    def line(self, number: int) -> int:
        return int(self._lines[number])

    @property
    def faults(self) -> list[Fault]:
        return [Fault(self.file, line, reason) for line, reason in self.facts["faults"]]

    @cached_property
    def _offsets(self) -> np.ndarray:
        return self._read("offsets.bin", "int64")

    @cached_property
    def _lines(self) -> np.ndarray:
        return self._read("lines.bin", "int64")

    @cached_property
    def _ids(self) -> np.ndarray:
        return self._read("ids.bin", "int32")

    @cached_property
    def _marks(self) -> np.ndarray:
        return self._read("marks.bin", "bool")

    def _read(self, name: str, dtype: str) -> np.ndarray:
        import numpy as np

        file = self.folder / name
        return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype=dtype)


def cache_key(**inputs: Any) -> str:
    """The name of what these inputs give."""
    return step_key("training tokens", format=_FORMAT, **inputs)


def find_cache(key: str, file: Path) -> TokenCache | None:
    """The cache of this name, None when it was never written."""
    folder = cache_dir() / "training" / key
    return TokenCache(folder, file) if folder.is_dir() else None


def write_cache(
    key: str, file: Path, examples: Iterable[tuple[int, Example]], faults: Sequence[Fault], facts: dict[str, Any]
) -> TokenCache:
    """Write examples, each with its line, as they come. `faults` and `facts` may still grow until the last has come.

    Raises DownloadError when the disk is full.
    """
    folder = cache_dir() / "training" / key
    with exclusive(folder):
        found = find_cache(key, file)
        if found is not None:
            return found
        with disk_errors(folder, "The cache of training tokens"), atomic_folder(folder) as part:
            _write_examples(part, examples)
            content = {**facts, "faults": [(fault.line, fault.reason) for fault in faults]}
            (part / "facts.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return TokenCache(folder, file)


def _write_examples(folder: Path, examples: Iterable[tuple[int, Example]]) -> None:
    # Rows are short: to convert a list to bytes by `array` takes a fraction of the time that numpy needs.
    with (
        (folder / "ids.bin").open("wb") as ids,
        (folder / "marks.bin").open("wb") as marks,
        (folder / "offsets.bin").open("wb") as offsets,
        (folder / "lines.bin").open("wb") as lines,
    ):
        end = 0
        offsets.write(_int64(end))
        for line, example in examples:
            end += len(example.ids)
            ids.write(array("i", example.ids).tobytes())
            marks.write(_marks(example))
            offsets.write(_int64(end))
            lines.write(_int64(line))


def _marks(example: Example) -> bytes:
    """One byte for each token: whether it is learnt."""
    marks = bytearray(len(example.ids))
    for start, end in example.spans:
        marks[start:end] = b"\1" * (end - start)
    return bytes(marks)


def _int64(number: int) -> bytes:
    return number.to_bytes(8, sys.byteorder)
