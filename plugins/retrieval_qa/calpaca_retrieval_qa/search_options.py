"""Options that say how passages are looked for."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, Field

from calpaca.core.errors import UsageError
from calpaca.documents.search import ChunkFilter, Search, SearchKind
from calpaca.plugins.options import OwnersOnly


class SearchOptions(BaseModel):
    """How passages are looked for, and among which."""

    k: int = Field(4, description="Chunks that are looked up.")
    search: SearchKind = Field(
        "hybrid",
        description="similarity of meaning; keywords: the same words (BM25); hybrid: both, their scores added; rrf: both, "
        "by their ranks; mmr (maximal marginal relevance): passages that differ.",
    )
    fetch_k: int = Field(20, description="Chunks that mmr, or the model of --rerank, chooses from.")
    mmr_lambda: float = Field(0.5, description="mmr: 1 is plain similarity, 0 the most different passages.")
    rerank: Annotated[str | None, OwnersOnly()] = Field(
        None,
        description="Cross-encoder that reads the question with each of the fetch_k best chunks and orders them anew: "
        "ms-marco-minilm-l-12 (English), a folder or a hub id.",
    )
    only: list[str] = Field(
        [], description="Look only into files that fit this pattern, as in '*.pdf'; repeat for several."
    )
    pages: str | None = Field(None, description="Look only at these pages, as in 3 or 3-9.")
    heading: str | None = Field(None, description="Look only below headings with these words.")

    def chosen_search(self) -> Search:
        """Raises UsageError for a number out of range, and for what excludes each other."""
        if self.rerank is not None and self.search == "mmr":
            raise UsageError("--rerank and --search mmr order the same chunks.", "Leave one of them out.")
        where = ChunkFilter(tuple(self.only), _range(self.pages), self.heading or "")
        return Search(self.k, self.search, self.fetch_k, self.mmr_lambda, where)


def _range(pages: str | None) -> tuple[int, int] | None:
    if pages is None:
        return None
    found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", pages)
    if found is None or (found[2] and int(found[2]) < int(found[1])):
        raise UsageError(f"--pages {pages} is no page or range of pages.", "Say --pages 3 or --pages 3-9.")
    return int(found[1]), int(found[2] or found[1])
