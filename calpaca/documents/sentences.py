"""Where sentences, paragraphs and headings of a text lie, as character offsets. Chinese and English."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

_CLOSERS = r"[”’」』）】》〉\"')\]*_]*"
_SENTENCE_END = re.compile(
    rf"[。！？；…]+{_CLOSERS}"
    rf"|(?<=[\u3400-\u9fff])[!?;]+{_CLOSERS}"
    rf"|[.!?]+{_CLOSERS}(?=\s|$)"
    r"|\n(?=[ \t]*(?:[-*+|]|\d+[.)])[ \t])"  # the next line is a list item or a table row
)
_CLAUSE_END = re.compile(r"[，、：,;:]+\s*|\s[–—-]\s")
_WORD_END = re.compile(r"\s+")

_ABBREVIATIONS = frozenset(
    [
        *("mr", "mrs", "ms", "dr", "prof", "rev", "gen", "col", "capt", "lt", "sgt", "sr", "jr", "st", "mt"),
        *("vs", "etc", "e.g", "i.e", "cf", "viz", "al", "fig", "figs", "eq", "ch", "sec", "vol", "pp", "p", "approx"),
        *("dept", "est", "inc", "ltd", "co", "corp", "a.m", "p.m", "u.s", "u.k", "ph.d"),
        *("jan", "feb", "mar", "apr", "jun", "jul", "aug", "sep", "sept", "oct", "nov", "dec"),
    ]
)
_LAST_WORD = re.compile(r"[^\s(\[\"'“‘]+$")

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_FENCE = re.compile(r"[ \t]*(```|~~~)")
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*?)[ \t]*#*\s*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-{2,})\s*$")


@dataclass(frozen=True)
class Block:
    """A paragraph, code block or heading: `text[start:end]`. `level` is that of a heading (1 to 6), else 0."""

    start: int
    end: int
    level: int = 0
    title: str = ""
    code: bool = False


Form = Literal["text", "markdown", "code", "rows"]
"""What a text is: `rows` are records with a line each."""


def blocks(text: str, form: Form) -> Iterator[Block]:
    """Paragraphs of a text, which blank lines part; headings and fenced code of Markdown; lines of `rows`."""
    if form == "rows":
        for match in _LINE.finditer(text):
            if match.group().strip():
                yield Block(match.start(), match.end())
    else:
        for block in _paragraphs(text, markdown=form == "markdown"):
            yield replace(block, code=True) if form == "code" else block


def _paragraphs(text: str, *, markdown: bool) -> Iterator[Block]:
    start: int | None = None  # of the paragraph in hand
    fence: str | None = None  # what opened the code block in hand
    end = 0
    for match in _LINE.finditer(text):
        line = match.group()
        mark = _FENCE.match(line) if markdown else None
        if fence is not None:
            end = match.end()
            if mark and mark[1] == fence:
                yield Block(start or 0, end, code=True)
                start = fence = None
            continue
        heading = _heading(text, start, match) if markdown else None
        if start is not None and (mark or not line.strip() or (heading and heading.start != start)):
            yield Block(start, end)
            start = None
        if heading:
            yield heading
            start = None
        elif line.strip():
            start, end = (match.start() if start is None else start), match.end()
            fence = mark[1] if mark else None
    if start is not None:
        yield Block(start, len(text), code=fence is not None)


def _heading(text: str, paragraph: int | None, line: re.Match[str]) -> Block | None:
    """The heading that a line is, or makes of the one-line paragraph above it."""
    marked = _HEADING.match(line.group())
    if marked:
        return Block(line.start(), line.end(), level=len(marked[1]), title=marked[2])
    underline = _UNDERLINE.match(line.group())
    if underline and paragraph is not None:
        above = text[paragraph : line.start()]
        if above.count("\n") == 1:
            level = 1 if underline[1][0] == "=" else 2
            return Block(paragraph, line.end(), level=level, title=above.strip())
    return None


def sentences(text: str, block: Block) -> Iterator[tuple[int, int]]:
    """(start, end) of the sentences of a block, without the white space around them; of its lines where it is code."""
    border = _WORD_LINE if block.code else _SENTENCE_END
    start = block.start
    for match in border.finditer(text, block.start, block.end):
        if block.code or _ends_sentence(text, match, block.end):
            yield from _trimmed(text, start, match.end())
            start = match.end()
    yield from _trimmed(text, start, block.end)


_WORD_LINE = re.compile(r"\n")


def _ends_sentence(text: str, match: re.Match[str], end: int) -> bool:
    """Whether a full stop ends a sentence, rather than an abbreviation, an initial or a list number."""
    if not match.group().startswith(".") or match.group().startswith(".."):
        return True
    following = text[match.end() : min(match.end() + 8, end)].lstrip()
    if following[:1].islower():
        return False
    word = _LAST_WORD.search(text, max(0, match.start() - 24), match.start())
    if word is None:
        return True
    before = word.group().lower()
    if before in _ABBREVIATIONS or (before in {"no", "nr"} and following[:1].isdigit()):
        return False
    if before.isdigit():  # "3." at the beginning of a line is a list number
        return bool(text[text.rfind("\n", 0, word.start()) + 1 : word.start()].strip())
    return len(before) > 1 or not before.isalpha()


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The range without white space at its ends, unless nothing is left."""
    part = text[start:end]
    if part.strip():
        yield start + len(part) - len(part.lstrip()), start + len(part.rstrip())


def runs(text: str, form: Form, most: int) -> list[str]:
    """The sentences of a text, headings left out; neighbours together where there are more than `most`."""
    ranges = [part for block in blocks(text, form) if not block.level for part in sentences(text, block)]
    size = -(-len(ranges) // most) or 1
    groups = (ranges[first : first + size] for first in range(0, len(ranges), size))
    return [text[group[0][0] : group[-1][1]] for group in groups]


def pieces(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """An over-long sentence in parts: at clauses, else at words, else in halves."""
    for border in (_CLAUSE_END, _WORD_END):
        cuts = [match.end() for match in border.finditer(text, start, end) if start < match.end() < end]
        if cuts:
            ranges = zip([start, *cuts], [*cuts, end], strict=True)
            return [part for left, right in ranges for part in _trimmed(text, left, right)]
    middle = (start + end) // 2
    return [*_trimmed(text, start, middle), *_trimmed(text, middle, end)]


def windows(text: str, start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """A range in parts of at most `size` characters, cut at spaces where there are any."""
    while end - start > size:
        space = text.rfind(" ", start + size // 2, start + size)
        cut = space + 1 if space >= 0 else start + size
        yield from _trimmed(text, start, cut)
        start = cut
    yield from _trimmed(text, start, end)
