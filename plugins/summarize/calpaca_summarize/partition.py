"""A text cut into sections and chunks that leave nothing out: every character lies in exactly one chunk.

Unlike the chunks of an index, these keep the white space between sentences, so that joined they are the text again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from calpaca.documents.sentences import Block, Form, blocks, pieces, sentences

CountTokens = Callable[[str], int]

_NUMBER = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|first|second|third|fourth|fifth"
_CHAPTER = re.compile(
    rf"\s*(?:(?:chapter|part|book|section|act|canto|letter|volume)\s+(?:(?-i:[IVXLCDM]+)|\d+|{_NUMBER})\b[^\n]{{0,60}}"
    r"|第\s*[0-9〇零一二三四五六七八九十百千两]+\s*[章节回卷部篇幕][^\n]{0,40})\s*",
    re.IGNORECASE,
)
_PARAGRAPH_FILL, _HEADING_FILL = 0.75, 0.5
"""A chunk ends early where a paragraph or heading begins, once it is this full."""

_BRANCH_FILL = 0.25
"""Sections smaller than this share of a chunk are read together with the next one."""


@dataclass(frozen=True)
class Chunk:
    """`text[start:end]` of a document. What lies before `fresh` repeats the end of the chunk before it."""

    start: int
    end: int
    fresh: int


@dataclass(frozen=True)
class Section:
    """A stretch of a document from one heading to the next, in chunks; the title is empty where there is none."""

    title: str
    chunks: tuple[Chunk, ...]

    @property
    def start(self) -> int:
        return self.chunks[0].start


@dataclass(frozen=True)
class _Unit:
    """A sentence with what follows up to the next one. `level` is that of a heading, else 0."""

    start: int
    end: int
    tokens: int = 0
    level: int = 0
    title: str = ""
    begins_block: bool = False


class Partition:
    """Cuts texts into chunks of at most `size` tokens, each repeating up to `overlap` tokens of the one before."""

    def __init__(self, count_tokens: CountTokens, size: int, overlap: int = 0) -> None:
        self.count_tokens = count_tokens
        self.size = size
        self.overlap = overlap

    def branches(self, text: str, form: Form) -> list[Section]:
        """Sections, small ones together with the next, so that none is much shorter than a chunk."""
        joined: list[list[_Unit]] = []
        for units in self._sections(text, form):
            if joined and sum(unit.tokens for unit in joined[-1]) < _BRANCH_FILL * self.size:
                joined[-1] += units
            else:
                joined.append(list(units))
        return [self._section(units) for units in joined]

    def sections(self, text: str, form: Form) -> list[Section]:
        """Every section by itself."""
        return [self._section(units) for units in self._sections(text, form)]

    def _section(self, units: Sequence[_Unit]) -> Section:
        title = next((unit.title for unit in units if unit.level), "")
        return Section(title, tuple(self._pack(units)))

    def _sections(self, text: str, form: Form) -> Iterator[list[_Unit]]:
        """The units between headings of the highest level that stands more than once."""
        units = list(self._counted(text, list(_units(text, form))))
        levels = [unit.level for unit in units if unit.level]
        border = min((level for level in set(levels) if levels.count(level) > 1), default=0)
        section: list[_Unit] = []
        for unit in units:
            if 0 < unit.level <= border and any(not each.level for each in section):
                yield section
                section = []
            section.append(unit)
        if section:
            yield section

    def _counted(self, text: str, units: Sequence[_Unit]) -> Iterator[_Unit]:
        """The units with their tokens, those longer than a chunk in pieces."""
        for unit in units:
            tokens = self.count_tokens(text[unit.start : unit.end])
            if tokens <= self.size or unit.end - unit.start < 2:
                yield replace(unit, tokens=tokens)
                continue
            starts = [start for start, _ in pieces(text, unit.start, unit.end)][1:]
            starts = starts or [(unit.start + unit.end) // 2]
            borders = [unit.start, *starts, unit.end]
            cut = [
                replace(unit, start=start, end=end, begins_block=unit.begins_block and start == unit.start)
                for start, end in pairwise(borders)
            ]
            yield from self._counted(text, cut)

    def _pack(self, units: Sequence[_Unit]) -> Iterator[Chunk]:
        packed: list[_Unit] = []
        fresh, tokens = 0, 0
        for unit in units:
            if len(packed) > fresh and (tokens + unit.tokens > self.size or self._ends_early(tokens, unit)):
                yield _chunk(packed, fresh)
                packed = self._repeated(packed, unit)
                fresh, tokens = len(packed), sum(each.tokens for each in packed)
            packed.append(unit)
            tokens += unit.tokens
        yield _chunk(packed, fresh)

    def _ends_early(self, tokens: int, unit: _Unit) -> bool:
        return unit.begins_block and tokens >= (_HEADING_FILL if unit.level else _PARAGRAPH_FILL) * self.size

    def _repeated(self, packed: Sequence[_Unit], unit: _Unit) -> list[_Unit]:
        """The last units of a chunk that fit the overlap, and a chunk together with the next unit."""
        room = min(self.overlap, self.size - unit.tokens)
        kept: list[_Unit] = []
        for each in reversed(packed):
            room -= each.tokens
            if room < 0:
                break
            kept.insert(0, each)
        return kept


def _chunk(packed: Sequence[_Unit], fresh: int) -> Chunk:
    return Chunk(packed[0].start, packed[-1].end, packed[fresh].start)


def _units(text: str, form: Form) -> Iterator[_Unit]:
    """Sentences and headings, each up to the beginning of the next, the first from the beginning of the text."""
    found = [
        _Unit(start, end, level=level, title=title, begins_block=number == 0)
        for block in blocks(text, form)
        for level, title in [_heading(text, block, form)]
        for number, (start, end) in enumerate([(block.start, block.end)] if level else sentences(text, block))
    ]
    starts = [0, *(unit.start for unit in found[1:])]
    for unit, start, end in zip(found, starts, [*starts[1:], len(text)], strict=True):
        yield replace(unit, start=start, end=end)


def _heading(text: str, block: Block, form: Form) -> tuple[int, str]:
    """Level and title; in plain text a line that says it is a chapter is a heading."""
    if block.level or form not in ("text", "markdown"):
        return block.level, block.title
    line = text[block.start : block.end]
    return (1, line.strip()) if _CHAPTER.fullmatch(line) else (0, "")
