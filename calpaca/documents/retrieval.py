"""Passages for a question, from any LangChain vector store or retriever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore

from calpaca.core.errors import UsageError
from calpaca.core.events import Source
from calpaca.core.reranker import Reranker
from calpaca.documents.hybrid import HybridRetriever
from calpaca.documents.search import Search

__all__ = ["Search", "reranked", "retrieve"]

_PLACE = {"start", "end", "start_line", "end_line", "index"}
"""What SentenceSplitter says about where a chunk lies."""


def retrieve(
    origin: VectorStore | BaseRetriever,
    question: str,
    search: Search = Search(),
    *,
    reranker: Reranker | None = None,
    merge: bool = True,
) -> list[Source]:
    """The passages nearest to a question, the best first.

    With a `reranker` the `fetch_k` best chunks are ordered as it scores them, before the `k` best are taken; their own
    scores stay what they were, its score is in the metadata as `rerank`. With `merge`, chunks of one document that touch
    or overlap become one passage with the best score among them; without, each chunk stays a passage, less what an
    earlier one holds already.
    """
    wider = replace(search, k=max(search.k, search.fetch_k)) if reranker is not None else search
    scored = _found(origin, question, wider)
    passages = [_passage(document, score) for document, score in scored if document.page_content.strip()]
    if reranker is not None:
        passages = reranked(passages, question, search, reranker)
    return _merge(passages) if merge else passages


def reranked(passages: Sequence[Source], question: str, search: Search, reranker: Reranker) -> list[Source]:
    """The `k` best of what was found; what lies past the `fetch_k` that the reranker scores follows as it came."""
    read, rest = passages[: search.fetch_k], passages[search.fetch_k :]
    scores = reranker.scores(question, [passage.text for passage in read])
    scored = [
        replace(passage, metadata=passage.metadata | {"rerank": float(score)})
        for passage, score in zip(read, scores, strict=True)
    ]
    return [*sorted(scored, key=lambda passage: -passage.metadata["rerank"]), *rest][: search.k]


def _found(origin: VectorStore | BaseRetriever, question: str, search: Search) -> list[tuple[Document, float | None]]:
    if isinstance(origin, HybridRetriever):
        return [*origin.ranked(question, search)]
    if isinstance(origin, BaseRetriever):
        return [(found, None) for found in origin.invoke(question)[: search.k]]
    if search.where or search.kind not in ("similarity", "mmr"):
        raise UsageError(
            f"A {type(origin).__name__} cannot be searched by {search.kind} or with a filter.",
            "Search a DocumentIndex's `retriever`, or by similarity.",
        )
    if search.kind == "mmr":
        return _diverse(origin, question, search)
    return [*origin.similarity_search_with_score(question, k=search.k)]


def _diverse(store: VectorStore, question: str, search: Search) -> list[tuple[Document, float | None]]:
    """MMR with scores, which stores do not give."""
    fetch_k = max(search.fetch_k, search.k)
    chosen = store.max_marginal_relevance_search(question, k=search.k, fetch_k=fetch_k, lambda_mult=search.lambda_mult)
    scores = {_identity(found): score for found, score in store.similarity_search_with_score(question, k=fetch_k)}
    return [(document, scores.get(_identity(document))) for document in chosen]


def _identity(document: Document) -> str:
    return document.id or document.page_content


def _passage(document: Document, score: float | None) -> Source:
    """With lines where the file has them; a page, slide, heading or paragraph, in the metadata, tells the place else."""
    metadata = document.metadata
    page = metadata.get("page")
    lines = (None, None) if metadata.get("converted") else (metadata.get("start_line"), metadata.get("end_line"))
    return Source(
        source=str(metadata.get("source", "")),
        text=document.page_content,
        page=page if isinstance(page, int) else None,
        start=lines[0],
        end=lines[1],
        score=None if score is None else float(score),
        metadata=dict(metadata),
    )


# Merging -----------------------------------------------------------------------------------------------------------
def _merge(passages: Sequence[Source]) -> list[Source]:
    """Join neighbours; a joined passage stands where the best of its parts stood."""
    ranked = sorted(enumerate(passages), key=lambda item: (item[1].source, item[1].metadata.get("start", 0)))
    runs: list[tuple[int, Source]] = []
    for rank, passage in ranked:
        if runs and _touch(runs[-1][1], passage):
            best, before = runs[-1]
            runs[-1] = (min(best, rank), _joined(before, passage))
        else:
            runs.append((rank, passage))
    return [passage for _, passage in sorted(runs, key=lambda run: run[0])]


def _touch(before: Source, after: Source) -> bool:
    """Whether two chunks of one document overlap or follow each other. Chunks of other splitters have no place."""
    if (before.source, before.page) != (after.source, after.page) or not all(
        passage.metadata.keys() >= _PLACE for passage in (before, after)
    ):
        return False
    follows = after.metadata["index"] == before.metadata["index"] + 1
    return bool(follows or after.metadata["start"] <= before.metadata["end"])


def _joined(before: Source, after: Source) -> Source:
    first, second = before.metadata, after.metadata
    if second["end"] <= first["end"]:
        return replace(before, score=_best(before, after))
    shared = first["end"] - second["start"]
    if shared >= 0:
        text = before.text + after.text[shared:]
    else:  # only white space lay between them; the lines tell how many line ends
        text = before.text + ("\n" * (second["start_line"] - first["end_line"]) or " ") + after.text
    place = {name: second[name] for name in ("end", "end_line", "index")}
    return replace(before, text=text, end=after.end, score=_best(before, after), metadata={**first, **place})


def _best(before: Source, after: Source) -> float | None:
    scores = [passage.score for passage in (before, after) if passage.score is not None]
    return max(scores, default=None)
