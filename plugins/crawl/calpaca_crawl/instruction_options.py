"""What `calpaca crawl instructions` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from calpaca.core.language import Language
from calpaca.plugins.options import Flag, ModelOptions, SamplingOptions
from calpaca_crawl.budget import Budget
from calpaca_crawl.methods import MethodName
from calpaca_crawl.row import Form


class InstructionOptions(ModelOptions, SamplingOptions):
    """The options, beside the output file."""

    methods: Annotated[list[MethodName], Flag("method")] = Field(
        ["topics"], description="How rows are made; repeat for several, which then take turns."
    )
    language: Language = Field("en", description="Language of prompts and rows: zh is Chinese.")
    generators: Annotated[list[str], Flag("generator")] = Field(
        [], description="Another model that makes rows in turn with --model; repeat for several."
    )
    seeds: Path | None = Field(None, description="JSONL rows to begin from, in place of the built-in ones.")
    documents: Annotated[list[Path], Flag("document")] = Field(
        [], description="File or folder that the method documents asks about; repeat for several."
    )
    data_file: Path | None = Field(None, description="Instructions that the method answers answers.")
    prompts: Path | None = Field(None, description="Folder whose files stand in place of our prompts and lists.")
    write_prompts: Path | None = Field(None, description="Write our prompts and lists to this folder, and end.")
    form: Form = Field("alpaca", description="Form of the rows.")
    records: int = Field(2, ge=1, le=50, description="Rows that one request asks for.")
    turns: int = Field(3, ge=2, le=20, description="Turns of a dialogue.")
    in_flight: int = Field(8, ge=1, description="Requests under way at once.")
    constrained: bool = Field(True, description="Hold models to a JSON schema, where the engine can.")
    any_language: bool = Field(False, description="Keep rows in other languages too.")
    keep_refusals: bool = Field(False, description="Keep rows whose answer is a refusal.")
    similarity: float = Field(0.7, gt=0, le=1, description="ROUGE-L from which on a question is no new one.")
    shortest_answer: int = Field(1, ge=1, description="Characters of an answer, at the least.")
    longest_answer: int = Field(8000, ge=1, description="Characters of an answer, at the most.")
    score: str | None = Field(None, description="Model that scores each row from 1 to 5; it may be --model itself.")
    min_score: int = Field(3, ge=1, le=5, description="Score that a row must have, where there is a --score model.")
    max_rows: int = Field(100, ge=1, description="Stop at so many rows.")
    max_tokens: int | None = Field(None, ge=1, description="Never use more tokens than this, prompts included.")
    max_cost: float | None = Field(None, gt=0, description="Never spend more than this, by the prices below.")
    max_time: float | None = Field(None, gt=0, description="Stop after so many seconds.")
    price_in: float = Field(0.0, ge=0, description="Price of a million tokens of prompts.")
    price_out: float = Field(0.0, ge=0, description="Price of a million tokens of replies.")
    overwrite: bool = Field(False, description="Replace the output of another run.")

    @property
    def budget(self) -> Budget:
        return Budget(self.max_rows, self.max_tokens, self.max_cost, self.max_time, self.price_in, self.price_out)
