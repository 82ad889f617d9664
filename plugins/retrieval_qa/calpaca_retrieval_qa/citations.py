"""Citations of an answer, checked against the documents before they are shown.

No model is asked to cite, and what it writes as if it did (`[3]`, words in quotation marks) proves nothing: the answer's
own sentences, its *claims*, are looked for in the passages by comparing strings. Every citation is a slice of a passage.

A claim is backed by (`match`)
`quoted`    its own words in quotation marks, all of which stand in one passage;
`verbatim`  a passage in which the claim itself stands, word for word;
`words`     one or two sentences that hold what it adds to the question: every number and name, and in all at least 0.8
            (`strict`) or 0.6 (`loose`) of its content words and Chinese characters.

What compares as equal is told in `quotation`. A claim that adds nothing ("Yes, it does.") has nothing to check and gets
no citation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from calpaca.core.events import Source
from calpaca.documents.sentences import blocks, sentences
from calpaca_retrieval_qa.facts import Fact, Statements, facts
from calpaca_retrieval_qa.quotation import FoldedText

Match = Literal["quoted", "verbatim", "words"]

_LEAST_SHARE = {"strict": 0.8, "loose": 0.6}
_MARKER = re.compile(r"[ \t]*(?:\[\^?\d{1,3}(?:\s*[,;–-]\s*\d{1,3})*\]|【[^】\n]{0,40}】)")
_CODE = re.compile(r"`[^`\n]*`")
_QUOTED = re.compile(r"[“「『]([^”」』\n]+)[”」』]|\"([^\"\n]+)\"|《([^》\n]+)》")
_QUOTE_MARKS = re.compile(r"[“”「」『』\"]")
_LEAST_QUOTE = 8
"""Letters, or half as many Chinese characters, below which words in quotation marks are a term and no quotation."""


@dataclass(frozen=True)
class Citation:
    """Words of a document that back a claim.

    `quote` is the passage's text as it stands; `start` and `end` are its lines, from 1, both included, and `offsets` its
    characters in the document, where the loader and splitter tell them.
    """

    number: int
    claim: str
    quote: str
    match: Match
    source: str
    page: int | None = None
    start: int | None = None
    end: int | None = None
    offsets: tuple[int, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As `--json` has it."""
        return asdict(self)

    def as_source(self) -> Source:
        """As the event that lists it."""
        return Source(
            self.source, self.quote, self.page, self.start, self.end, metadata={"quote": True, "number": self.number}
        )


@dataclass(frozen=True)
class _Span:
    """A place in one of the passages."""

    passage: int
    start: int
    end: int


@dataclass
class CitedAnswer:
    """The text that is shown, its citations, and what was not shown or could not be backed."""

    text: str = ""
    citations: list[Citation] = field(default_factory=list)
    uncited: list[str] = field(default_factory=list)
    removed_claims: list[str] = field(default_factory=list)
    removed_markers: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As `--json` has it beside the answer."""
        return {
            "citations": [citation.as_dict() for citation in self.citations],
            "uncited_claims": self.uncited,
            "removed": {"claims": self.removed_claims, "markers": self.removed_markers},
        }


class CitationChecker:
    """Reads an answer as it comes and gives out each sentence once it is checked, followed by its markers `[1]`.

    The passages are those that the model was shown. `answer` is what is known so far.
    """

    def __init__(self, mode: Literal["strict", "loose"], question: str, passages: Sequence[Source]) -> None:
        self.mode = mode
        self.answer = CitedAnswer()
        self._asked = facts(question)
        self._question = Statements(question)
        self._passages = [_Passage(passage) for passage in passages]
        self._pending = ""

    def feed(self, text: str) -> str:
        """More of the answer; returns what may be shown by now."""
        self._pending += text
        shown = ""
        while (end := _first_sentence(self._pending)) is not None:
            claim, self._pending = self._pending[:end], self._pending[end:]
            shown += self._check(claim)
        return self._show(shown)

    def finish(self) -> str:
        """The rest of the answer."""
        claim, self._pending = self._pending, ""
        return self._show(self._check(claim))

    def _show(self, text: str) -> str:
        if not self.answer.text:
            text = text.lstrip()
        self.answer.text += text
        return text

    # Checking ------------------------------------------------------------------------------------------------------
    def _check(self, raw: str) -> str:
        """A sentence as it is shown."""
        claim, markers = without_markers(raw)
        self.answer.removed_markers += markers
        bare = claim.strip()
        if not bare:
            return claim
        found = self._backing(bare)
        if found is None:
            return self._unbacked(claim, bare)
        match, spans = found
        numbers = dict.fromkeys(self._cite(bare, match, span) for span in spans)
        tail = claim[len(claim.rstrip()) :]
        return claim.rstrip() + "".join(f" [{number}]" for number in numbers) + tail

    def _unbacked(self, claim: str, bare: str) -> str:
        """What is shown of a claim that nothing backs: in `loose` its text, no longer as a quotation."""
        if self.mode == "strict" and not self._adds_nothing(bare):
            self.answer.removed_claims.append(bare)
            return ""
        self.answer.uncited.append(bare)
        return _QUOTE_MARKS.sub("", claim) if _quotations(bare) else claim

    def _adds_nothing(self, claim: str) -> bool:
        return not self._added(claim)

    def _added(self, claim: str) -> set[Fact]:
        """What a claim says that the question does not."""
        return {fact for fact in facts(claim) if fact not in self._question}

    def _backing(self, claim: str) -> tuple[Match, list[_Span]] | None:
        quotations = _quotations(claim)
        if quotations:
            spans = [self._find(quotation) for quotation in quotations]
            found = [span for span in spans if span is not None]
            return ("quoted", [*map(self._whole_sentence, found)]) if len(found) == len(spans) else None
        if self._adds_nothing(claim):
            return None
        whole = self._find(claim)
        if whole is not None and _is_long(claim):
            return "verbatim", [self._whole_sentence(whole)]
        span = self._by_words(claim)
        return ("words", [span]) if span is not None else None

    def _find(self, quote: str) -> _Span | None:
        """Where a quotation stands: the sentence with most of the question's words, where it stands in several."""
        spans = []
        for number, passage in enumerate(self._passages):
            place = passage.folded.find(quote)
            if place is not None:
                spans.append(_Span(number, *place))
        return max(spans, key=lambda span: self._relevance(self._whole_sentence(span)), default=None)

    def _by_words(self, claim: str) -> _Span | None:
        """The sentence, or two neighbours, that hold most of what the claim adds; the nearest to the question of equals."""
        wanted = self._added(claim)
        exact = {fact for fact in wanted if fact.exact}
        best: tuple[float, float, _Span] | None = None
        for number, passage in enumerate(self._passages):
            for start, end, statements in passage.windows:
                held = statements.held(wanted)
                share = len(held) / len(wanted)
                if share < _LEAST_SHARE[self.mode] or not exact <= held:
                    continue
                span = _Span(number, start, end)
                key = (share, self._relevance(span) - 0.001 * (end - start), span)
                if best is None or key[:2] > best[:2]:
                    best = key
        return best[2] if best is not None else None

    def _relevance(self, span: _Span) -> float:
        """Words of the question in a span; nearer passages come first among equals."""
        statements = Statements(self._passages[span.passage].folded.text[span.start : span.end])
        return len(statements.held(self._asked)) - 0.1 * span.passage

    def _whole_sentence(self, span: _Span) -> _Span:
        return _Span(span.passage, *self._passages[span.passage].sentence_around(span.start, span.end))

    def _cite(self, claim: str, match: Match, span: _Span) -> int:
        """Note a citation; the same words have one number. Returns the number."""
        passage = self._passages[span.passage]
        quote = passage.folded.text[span.start : span.end]
        for known in self.answer.citations:
            if (known.quote, known.source, known.page) == (quote, passage.source.source, passage.source.page):
                return known.number
        number = len(self.answer.citations) + 1
        self.answer.citations.append(passage.citation(number, claim, match, span.start, span.end))
        return number


class _Passage:
    """A passage, folded, and where its sentences lie."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.folded = FoldedText(source.text)
        form = source.metadata.get("format", "text")
        self.sentences = [place for block in blocks(source.text, form) for place in sentences(source.text, block)]

    @cached_property
    def windows(self) -> list[tuple[int, int, Statements]]:
        """Each sentence, then each two that follow each other: where they lie and what they say."""
        pairs = [(start, end) for (start, _), (_, end) in pairwise(self.sentences)]
        return [(start, end, Statements(self.source.text[start:end])) for start, end in (*self.sentences, *pairs)]

    def sentence_around(self, start: int, end: int) -> tuple[int, int]:
        """The sentences that a range lies in."""
        touched = [place for place in self.sentences if place[0] < end and place[1] > start] or [(start, end)]
        return min(touched[0][0], start), max(touched[-1][1], end)

    def citation(self, number: int, claim: str, match: Match, start: int, end: int) -> Citation:
        source = self.source
        quote, offsets = source.text[start:end], _offsets(source, start, end)
        if source.start is None:
            return Citation(number, claim, quote, match, source.source, source.page, offsets=offsets)
        first = source.start + source.text.count("\n", 0, start)
        last = first + quote.count("\n")
        return Citation(number, claim, quote, match, source.source, source.page, first, last, offsets)


def _offsets(source: Source, start: int, end: int) -> tuple[int, int] | None:
    """Characters in the document; unknown in a passage that was joined over white space of another length."""
    first, last = source.metadata.get("start"), source.metadata.get("end")
    if first is None or last is None or last - first != len(source.text):
        return None
    return first + start, first + end


# Texts --------------------------------------------------------------------------------------------------------------
def _first_sentence(text: str) -> int | None:
    """Where the first sentence of a text under way ends, with the white space after it; None before that is sure."""
    for block in blocks(text, "text"):
        for _, end in sentences(text, block):
            rest = text[end:]
            if rest.strip():
                return end + len(rest) - len(rest.lstrip())
    return None


def without_markers(text: str) -> tuple[str, int]:
    """A text without the marks of citations in it, and how many there were. Code keeps its brackets."""
    code = [match.span() for match in _CODE.finditer(text)]
    marks = [match for match in _MARKER.finditer(text) if not any(a <= match.start() < b for a, b in code)]
    for match in reversed(marks):
        text = text[: match.start()] + text[match.end() :]
    return text, len(marks)


def _quotations(claim: str) -> list[str]:
    found = ["".join(match.groups(default="")) for match in _QUOTED.finditer(claim) if match[3] is None]
    return [quote for quote in found if _is_long(quote)]


def _is_long(quote: str) -> bool:
    return sum(1 if character < "\u3000" else 2 for character in FoldedText(quote).folded) >= _LEAST_QUOTE
