"""What `calpaca run retrieval_qa` and `calpaca run retrieval_index` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from calpaca.core.context import ContextPolicy
from calpaca.plugins.options import ModelOptions, OwnersOnly, SamplingOptions
from calpaca_retrieval_qa.index_options import IndexOptions
from calpaca_retrieval_qa.search_options import SearchOptions

Strategy = Literal["stuff", "refine", "map_rerank", "auto"]
CiteMode = Literal["strict", "loose", "off"]


class RetrievalIndexOptions(IndexOptions, ModelOptions):
    """Options of the job that builds an index. Of the model options it uses `--embedding` alone."""


class RetrievalQAOptions(IndexOptions, SearchOptions, ModelOptions, SamplingOptions):
    """Options of the question answerer."""

    question: str | None = Field(None, description="What to ask; without it questions are read line by line.")
    strategy: Strategy = Field(
        "stuff",
        description="stuff: one prompt with all passages; refine: an answer improved passage by passage; map_rerank: the "
        "best of an answer from each; auto: stuff if it fits, else map_rerank.",
    )
    cite: CiteMode = Field(
        "loose",
        description="Citations, each checked against the documents. strict leaves out sentences that have none; loose "
        "shows them; off cites nothing.",
    )
    context_policy: ContextPolicy = Field(
        "drop",
        description="Passages without room in the context: drop (named), summarise, refine (asked about in turn) or error.",
    )
    session: Annotated[str | None, OwnersOnly()] = Field(
        None, description="Name of a conversation to begin or go on with."
    )
    rewrite: bool = Field(True, description="Have follow-up questions rewritten so that they stand alone.")
    prompt_file: Path | None = Field(None, description="TOML file with prompts of your own.")

    evaluate: Path | None = Field(None, description="Measure the answers to the questions of this JSON Lines file.")
    compare: list[str] = Field(
        [], description="With --evaluate: another configuration beside it, as in search=hybrid,k=8; repeat for several."
    )
    parallel: int = Field(1, description="With --evaluate: questions asked at once; times are then longer.")
    make_evalset: Path | None = Field(None, description="Draft questions about the documents into this new file.")
    drafts: int = Field(24, description="With --make-evalset: passages that a question is drafted from.")
    calibrate: Path | None = Field(
        None,
        description="Choose the threshold for saying that the documents hold nothing, on the questions of this file.",
    )

    def parameters(self) -> dict[str, Any]:
        """These options as the ledger keeps them, with paths that hold in any folder."""
        given: dict[str, Any] = self.model_dump(mode="json", exclude_unset=True)
        for name in ("evaluate", "make_evalset", "calibrate", "prompt_file"):
            if given.get(name):
                given[name] = str(Path(given[name]).expanduser().absolute())
        return given | self.job_parameters(self.embedding)
