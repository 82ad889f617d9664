"""An answerer put together from options: index, model, and the rules of the answer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from calpaca.core.events import Event
from calpaca.core.jobs import Job
from calpaca.core.runtime import Runtime
from calpaca.documents.index import DocumentIndex
from calpaca.plugins.options import ModelOptions, SamplingOptions
from calpaca_retrieval_qa.answerer import RetrievalQA
from calpaca_retrieval_qa.calibration import rule_for
from calpaca_retrieval_qa.indexing import start_job
from calpaca_retrieval_qa.options import RetrievalQAOptions
from calpaca_retrieval_qa.session import KeptConversation

_NOT_KEPT = {"question", "session", *ModelOptions.model_fields, *SamplingOptions.model_fields}
"""Options that a question of a conversation is not asked again with: a chat has a model of its own."""


def build_answerer(options: RetrievalQAOptions, runtime: Runtime) -> tuple[RetrievalQA, DocumentIndex]:
    """The answerer and the index it looks into."""
    from calpaca.core.langchain import ChatCalpaca

    search = options.chosen_search()
    reranker = runtime.reranker(options.rerank) if options.rerank is not None else None
    sampling = options.sampling(runtime.settings)
    index = options.index(runtime, options.embedding)
    model = runtime.model(options.spec())
    llm = ChatCalpaca.from_model(model, sampling)
    qa = RetrievalQA(
        llm,
        index.retriever,
        strategy=options.strategy,
        search=search,
        reranker=reranker,
        cite=options.cite,
        context_policy=options.context_policy,
        prompt_file=options.prompt_file,
        evidence=rule_for(index.embedder, options.chunk_size),
        prepare=partial(_sync_once, index, partial(start_job, options, runtime), []),
        session=_session(options, runtime),
        rewrites=options.rewrite,
        max_new_tokens=sampling.max_new_tokens,
        model_name=model.name,
        languages=languages_of(model.name),
    )
    return qa, index


def _session(options: RetrievalQAOptions, runtime: Runtime) -> KeptConversation | None:
    """The conversation that is named, or a new one of that name."""
    if options.session is None:
        return None
    asked = {name: value for name, value in options.parameters().items() if name not in _NOT_KEPT}
    session = runtime.sessions.resume(options.session, {"app": "retrieval_qa"})
    return KeptConversation(session, asked)


def _sync_once(index: DocumentIndex, start: partial[Job], done: list[bool]) -> Iterator[Event]:
    """Bring the index up to date before the first question."""
    if not done:
        yield from index.sync(start)
        done.append(True)


def languages_of(model: str) -> str:
    """What the catalogue says about a model's languages; empty for one that it does not know."""
    from calpaca.core.catalogue import ENTRIES

    return ENTRIES[model].languages if model in ENTRIES else ""
