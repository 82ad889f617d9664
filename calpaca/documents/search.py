"""What is looked for in an index, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from calpaca.core.errors import UsageError

SearchKind = Literal["hybrid", "rrf", "similarity", "keywords", "mmr"]


@dataclass(frozen=True)
class ChunkFilter:
    """Which chunks of an index are looked at; what is left empty does not matter.

    `sources` are patterns for a file's path or its last parts (`*.md`, `manual/*`), `pages` the first and the last page,
    `heading` a part of the heading path, in any case.
    """

    sources: tuple[str, ...] = ()
    pages: tuple[int, int] | None = None
    heading: str = ""

    def __bool__(self) -> bool:
        return bool(self.sources or self.pages or self.heading)

    def condition(self) -> tuple[str, list[object]]:
        """SQL for the columns path, page and heading, and its parameters."""
        clauses: list[str] = []
        parameters: list[object] = []
        if self.sources:
            clauses.append("(" + " OR ".join(["path GLOB ? OR path GLOB ?"] * len(self.sources)) + ")")
            parameters += [pattern for source in self.sources for pattern in (source, f"*/{source}")]
        if self.pages:
            clauses.append("page BETWEEN ? AND ?")
            parameters += self.pages
        if self.heading:
            clauses.append("instr(lower(heading), lower(?)) > 0")
            parameters.append(self.heading)
        return " AND ".join(clauses) or "1", parameters


@dataclass(frozen=True)
class Search:
    """How many passages are looked for and how.

    Any vector store can be searched by `similarity` and `mmr`, which takes, of the `fetch_k` most similar, those that
    repeat each other least; `lambda_mult` 1 is plain similarity, 0 the most different. An index also by `keywords`
    (BM25) and by both together: `hybrid` adds standardised scores, `rrf` reciprocal ranks; and only an index knows
    `where`. A reranker, where there is one, orders the `fetch_k` best anew.
    """

    k: int = 4
    kind: SearchKind = "similarity"
    fetch_k: int = 20
    lambda_mult: float = 0.5
    where: ChunkFilter = field(default_factory=ChunkFilter)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"k is {self.k}.", "Ask for at least one passage, better four.")
        if not 0.0 <= self.lambda_mult <= 1.0:
            raise UsageError(f"lambda is {self.lambda_mult}.", "It must be between 0 and 1.")
