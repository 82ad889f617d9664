"""What `calpaca run summarize` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from calpaca.plugins.options import Flag, ModelOptions, SamplingOptions
from calpaca_summarize.prompts import Wishes

ANSWER_TOKENS = {"short": 96, "medium": 224, "long": 640}
"""Longest summary of each length, where `--max-new-tokens` does not say otherwise."""


class SummarizeOptions(ModelOptions, SamplingOptions):
    """Options of the summarizer."""

    files: Annotated[list[Path], Flag("file")] = Field(
        [],
        description="Document, or a folder of them: text, Markdown, HTML, PDF, EPUB, Office, tables, JSON, code; repeat for several.",
    )
    text: str | None = Field(None, description="Text to sum up, in place of documents.")
    strategy: Literal["auto", "stuff", "refine", "map_reduce"] = Field(
        "auto",
        description="stuff: all in one prompt; refine: chunk after chunk, improving the summary; map_reduce: all chunks "
        "at once, then summaries of the summaries; auto: stuff if the context holds it, else map_reduce.",
    )
    length: Literal["short", "medium", "long"] = Field("medium", description="How long the summary is to be.")
    style: Literal["prose", "bullets"] = Field("prose", description="Running text, or a list.")
    focus: str | None = Field(None, description="What to attend to above all.")
    language: str | None = Field(
        None, description="Language of the summary, such as English or zh; else the text's own."
    )
    by_section: bool = Field(False, description="A summary of each section or chapter, by the headings of the text.")
    chunk_size: int | None = Field(None, description="Longest chunk in tokens of the model; else 1024 or what fits.")
    chunk_overlap: int = Field(0, ge=0, description="Tokens that a chunk repeats from the one before it.")

    def wishes(self) -> Wishes:
        """What the summary is to be like."""
        return Wishes(self.length, self.style, self.focus, self.language)

    def job_parameters(self) -> dict[str, Any]:
        """These options as the ledger keeps them: from any folder they start the same job again."""
        given = self.model_dump(mode="json", exclude_defaults=True, exclude={"files"})
        return {"files": [str(path.expanduser().resolve()) for path in self.files], **given}
