"""Records of tables and of JSON as lines of text: line n is row n, so that a passage's lines name its rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from calpaca.documents.formats.markdown import one_line


def named_rows(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A line per row, each value after the name of its column; the first row that is not empty names the columns."""
    names: list[str] | None = None
    for row in rows:
        cells = [one_line(cell) for cell in row]
        if names is None and any(cells):
            names = cells
            yield "; ".join(cell for cell in cells if cell)
        else:
            yield _line(names or [], cells)


def _line(names: Sequence[str], cells: Sequence[str]) -> str:
    padded = [*names, *[""] * (len(cells) - len(names))]
    return "; ".join(f"{name}: {cell}" if name else cell for name, cell in zip(padded, cells, strict=False) if cell)


def record(value: Any) -> str:
    """A JSON value on one line, each leaf after its path: `name: Ada; tags[0]: llama`."""
    return "; ".join(f"{path}: {text}" if path else text for path, text in leaves(value) if text)


def leaves(value: Any) -> Iterator[tuple[str, str]]:
    """(path, text) of the numbers, truth values and texts in a JSON value. Iterative: JSON may nest very deep."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, item = stack.pop()
        if isinstance(item, dict):
            stack += [(f"{path}.{key}" if path else str(key), inner) for key, inner in reversed(item.items())]
        elif isinstance(item, list):
            stack += [(f"{path}[{number}]", inner) for number, inner in reversed(list(enumerate(item)))]
        elif item is not None:
            yield path, one_line(str(item).lower() if isinstance(item, bool) else str(item))
