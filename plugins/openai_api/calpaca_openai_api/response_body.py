"""The request to /v1/responses, and the refusal of what no model here does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from calpaca_openai_api.bodies import MOST_STOPS, Body, Penalty, Seed, StopText, StreamOptions
from calpaca_openai_api.faults import ApiError, unsupported

LOGPROBS = "message.output_text.logprobs"
"""The one thing that can be asked for by `include`."""


class TextFormat(Body):
    model_config = ConfigDict(extra="ignore", populate_by_name=True, serialize_by_alias=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class Text(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseBody(Body):
    """A request to /v1/responses. `input` is a text, or items: messages, calls of functions and what these gave."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = Field(None, ge=16)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    text: Text | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    # Extensions, as in a chat.
    seed: Seed | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, gt=0.0)
    options: dict[str, Any] | None = Field(None, description="Extension: options of an app.")
    # Taken, since they change nothing in an answer.
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    # Known, and refused where they ask for something.
    reasoning: dict[str, Any] | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    context_management: list[dict[str, Any]] | None = None
    max_tool_calls: int | None = None
    moderation: dict[str, Any] | None = None

    @property
    def is_kept(self) -> bool:
        """Whether the response is stored: OpenAI's default."""
        return self.store is not False

    @property
    def format(self) -> TextFormat:
        return (self.text and self.text.format) or TextFormat()

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())


def refuse_response_fields(body: ResponseBody) -> None:
    """Raise ApiError for a field that asks for what is not done here."""
    for name, (asked, why) in _unsupported(body).items():
        if asked:
            raise unsupported(name, why)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "'stream_options' is for streamed responses only.", param="stream_options")
    if body.background and not body.is_kept:
        raise ApiError(400, "What is made in the background is kept; 'store' cannot be false.", param="store")


def _unsupported(body: ResponseBody) -> dict[str, tuple[object, str]]:
    effort = (body.reasoning or {}).get("effort") not in (None, "none")
    others = set(body.include or ()) - {LOGPROBS}
    padded = body.stream_options is not None and body.stream_options.include_obfuscation
    return {
        "reasoning": (effort, "the models here do not reason apart from their answer."),
        "conversation": (body.conversation is not None, "use 'previous_response_id'."),
        "prompt": (body.prompt is not None, "give 'instructions' and 'input'."),
        "context_management": (body.context_management is not None, "shorten the input."),
        "max_tool_calls": (body.max_tool_calls is not None, "there are no built-in tools."),
        "moderation": (body.moderation is not None, "the models here do not do this."),
        "include": (others, f"only '{LOGPROBS}' can be included."),
        "stream_options.include_obfuscation": (padded, "nothing is obfuscated."),
        "text.verbosity": (body.text is not None and body.text.verbosity not in (None, "medium"),
                           "say in 'instructions' how long the answer should be."),
    }  # fmt: skip
