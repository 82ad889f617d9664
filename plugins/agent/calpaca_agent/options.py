"""What `calpaca run agent` can be told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from calpaca.plugins.options import Flag, ModelOptions, SamplingOptions

Approve = Literal["ask", "never", "always"]


class AgentOptions(ModelOptions, SamplingOptions):
    """Options of the agent."""

    task: str | None = Field(None, description="What to do or to answer.")
    tools: Annotated[list[str], Flag("tool")] = Field(
        [], description="App or named instance to use; repeat for several. By default all that answer and only read."
    )
    mcp: list[str] = Field(
        [], description="MCP server whose tools to use, as a command line or a URL; repeat for several."
    )
    approve: Approve = Field(
        "ask", description="Whether a tool that writes may run: ask on the terminal, never or always."
    )
    max_steps: int = Field(8, ge=1, description="Longest run, in answers of the model.")
