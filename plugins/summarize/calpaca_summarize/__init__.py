"""Summaries of documents."""

from __future__ import annotations

from calpaca import App, hookimpl

calpaca_api = ">=1,<2"


@hookimpl
def register_apps() -> list[App]:
    """The summarizer: an answer app, whose runs are jobs too, so that a run that was cut short is taken up again."""
    return [
        App(
            "summarize",
            "Summarizes documents of any length, and shows that all of it was read.",
            "calpaca_summarize.app:build",
            extra="torch",
            options="calpaca_summarize.options:SummarizeOptions",
            input="text",
            answer="summary",
            documents="files",
        )
    ]
