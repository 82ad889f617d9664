"""Questions answered from documents."""

from __future__ import annotations

from calpaca import App, hookimpl

calpaca_api = ">=1,<2"


@hookimpl
def register_apps() -> list[App]:
    """The question answerer and the job that builds its index ahead."""
    return [
        App(
            "retrieval_qa",
            "Answers questions about your documents, with sources.",
            "calpaca_retrieval_qa.app:build",
            extra="torch",
            options="calpaca_retrieval_qa.options:RetrievalQAOptions",
            input="question",
            history=True,
        ),
        App(
            "retrieval_index",
            "Indexes documents ahead of the first question.",
            "calpaca_retrieval_qa.indexing:build",
            extra="torch",
            options="calpaca_retrieval_qa.options:RetrievalIndexOptions",
            kind="job",
            effects="write",
            answer="folder",
        ),
    ]
