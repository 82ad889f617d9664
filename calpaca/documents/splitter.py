"""Documents to chunks that an embedding model reads whole."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from langchain_core.documents import BaseDocumentTransformer, Document

from calpaca.core.errors import UsageError
from calpaca.documents.sentences import Form, blocks, pieces, sentences, windows

CountTokens = Callable[[Sequence[str]], list[int]]

_HEADING_FILL = 0.25
_PARAGRAPH_FILL = 0.5
"""A chunk ends early where a heading or paragraph begins, once it is this full. That keeps sections apart, and makes
the chunks after an edit the same as before it, so that they need no new embedding."""


_WINDOW = 50_000
"""Characters of a sentence that are cut up at once."""


@dataclass(frozen=True, slots=True)
class _Unit:
    """A sentence or a part of one: where it lies, its tokens, and whether a heading or paragraph begins with it."""

    start: int
    end: int
    tokens: int
    heading: str
    is_heading: bool
    begins_block: bool


CHUNK_SIZE = 96
"""Tokens: small models answer best from short passages that lie near the question (docs/quality.md)."""

CHUNK_OVERLAP = 16


class SentenceSplitter(BaseDocumentTransformer):
    """Packs whole sentences into chunks of at most `chunk_size` tokens.

    A chunk that is cut within running text begins with the last sentences of the one before, up to `chunk_overlap`
    tokens. A sentence longer than a chunk is cut at clauses, words or characters. `count_tokens` gives the tokens of
    several texts, as `Embedder.count_tokens` does.

    Every chunk is a slice of its document. Metadata, beside the document's own: `start` and `end` (characters),
    `start_line` and `end_line` (from 1, both included), `index` (from 0), `tokens`, in Markdown `heading`
    (`Chapter > Section`), and in text that a loader made of something else (`converted`) `paragraph` (from 1).
    """

    def __init__(
        self, count_tokens: CountTokens, chunk_size: int = CHUNK_SIZE, chunk_overlap: int = CHUNK_OVERLAP
    ) -> None:
        if chunk_size < 8:
            raise UsageError(f"The chunk size is {chunk_size} tokens.", "It must be at least 8.")
        if not 0 <= chunk_overlap < chunk_size:
            raise UsageError(
                f"The chunk overlap is {chunk_overlap} tokens.", f"It must be below the chunk size, {chunk_size}."
            )
        self.count_tokens = count_tokens
        self.chunk_size = chunk_size
        self.chunk_overlap = chunk_overlap

    def transform_documents(self, documents: Sequence[Document], **_: Any) -> Sequence[Document]:
        return self.split_documents(documents)

    def split_documents(self, documents: Iterable[Document]) -> list[Document]:
        """Chunks of all documents, in their order."""
        return [chunk for document in documents for chunk in self._split(document)]

    def _split(self, document: Document) -> Iterator[Document]:
        text = document.page_content
        line_starts = [0, *(position + 1 for position, character in enumerate(text) if character == "\n")]
        units = self._units(text, document.metadata.get("format", "text"))
        for index, packed in enumerate(self._pack(units)):
            start, end = packed[0].start, packed[-1].end
            body = [unit for unit in packed if not unit.is_heading] or packed[-1:]
            place = {
                "start": start,
                "end": end,
                "start_line": bisect_right(line_starts, start),
                "end_line": bisect_right(line_starts, end - 1),
                "index": index,
                "tokens": sum(unit.tokens for unit in packed),
            }
            heading = {"heading": body[0].heading} if body[0].heading else {}
            if document.metadata.get("converted"):
                place["paragraph"] = text.count("\n\n", 0, start) + 1
            yield Document(text[start:end], metadata={**document.metadata, **place, **heading})

    def _units(self, text: str, form: Form) -> list[_Unit]:
        units: list[_Unit] = []
        path: list[tuple[int, str]] = []
        for block in blocks(text, form):
            if block.level:
                path = [(level, title) for level, title in path if level < block.level] + [(block.level, block.title)]
            heading = " > ".join(title for _, title in path)
            parts = sentences(text, block)
            if block.level:
                parts = iter([(block.start, block.start + len(text[block.start : block.end].rstrip()))])
            for position, (start, end) in enumerate(parts):
                units.append(_Unit(start, end, 0, heading, block.level > 0, position == 0))
        return self._counted(text, units)

    def _counted(self, text: str, units: list[_Unit]) -> list[_Unit]:
        """The units with their tokens, those longer than a chunk in pieces."""
        counted: list[_Unit] = []
        counts = self.count_tokens([text[unit.start : unit.end] for unit in units])
        for unit, tokens in zip(units, counts, strict=True):
            if tokens <= self.chunk_size or unit.end - unit.start < 2:
                counted.append(_Unit(unit.start, unit.end, tokens, unit.heading, unit.is_heading, unit.begins_block))
                continue
            if unit.end - unit.start > _WINDOW:
                counted += self._counted_in_windows(text, unit)
                continue
            parts = pieces(text, unit.start, unit.end)
            cut = [
                _Unit(start, end, 0, unit.heading, unit.is_heading, unit.begins_block and number == 0)
                for number, (start, end) in enumerate(parts)
            ]
            counted += self._counted(text, cut)
        return counted

    def _counted_in_windows(self, text: str, unit: _Unit) -> list[_Unit]:
        """A sentence of many pages, as a file without line ends is: window by window, its pieces joined to quarters of a
        chunk, so that a hundred million words are never in memory one by one.
        """
        counted: list[_Unit] = []
        for number, (start, end) in enumerate(windows(text, unit.start, unit.end, _WINDOW)):
            window = _Unit(start, end, 0, unit.heading, unit.is_heading, unit.begins_block and number == 0)
            counted += self._joined(self._counted(text, [window]))
        return counted

    def _joined(self, units: list[_Unit]) -> Iterator[_Unit]:
        last: _Unit | None = None
        for unit in units:
            if last is None:
                last = unit
            elif last.tokens + unit.tokens <= self.chunk_size // 4:
                last = replace(last, end=unit.end, tokens=last.tokens + unit.tokens)
            else:
                yield last
                last = unit
        if last is not None:
            yield last

    def _pack(self, units: list[_Unit]) -> Iterator[list[_Unit]]:
        chunk: list[_Unit] = []
        fresh = 0  # units of the chunk that no earlier one holds
        for unit in units:
            tokens = sum(part.tokens for part in chunk)
            full = tokens + unit.tokens > self.chunk_size
            early = self._ends_early(chunk, tokens, unit)
            if fresh and (full or early):
                yield chunk
                chunk = [] if early else self._overlap(chunk, unit)
                fresh = 0
            elif full:
                chunk = self._overlap(chunk, unit)
            chunk.append(unit)
            fresh += 1
        if fresh:
            yield chunk

    def _ends_early(self, chunk: list[_Unit], tokens: int, unit: _Unit) -> bool:
        if all(part.is_heading for part in chunk):
            return False
        fill = _HEADING_FILL if unit.is_heading else _PARAGRAPH_FILL
        return unit.begins_block and tokens >= fill * self.chunk_size

    def _overlap(self, chunk: list[_Unit], unit: _Unit) -> list[_Unit]:
        """The last sentences of a chunk that fit the overlap, and the next chunk together with its first unit."""
        room = min(self.chunk_overlap, self.chunk_size - unit.tokens)
        kept: list[_Unit] = []
        for part in reversed(chunk):
            room -= part.tokens
            if room < 0 or part.is_heading:
                break
            kept.insert(0, part)
        return kept
