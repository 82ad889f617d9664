"""The requests: their fields, types and bounds. An unknown field is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from calpaca.core.decoding import NOT_OFFERED, refuse_not_offered
from calpaca.core.errors import UnsupportedError
from calpaca_openai_api.faults import unsupported

MOST_STOPS = 4
MOST_CHOICES = 128
"""Prompts times answers in one request."""

TokenIds = list[Annotated[int, Field(ge=0)]]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class Body(BaseModel):
    """A request, or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Taken; nothing is obfuscated.")


class GenerationBody(Body):
    """What chats and completions share."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100.0, le=100.0)]] | None
    ) = None
    user: str | None = None
    top_k: int | None = Field(None, ge=-1, description="Extension: keep this many of the likeliest tokens.")
    min_p: float | None = Field(
        None, ge=0.0, le=1.0, description="Extension: keep tokens of this share of the likeliest one's probability."
    )
    repetition_penalty: float | None = Field(None, gt=0.0, description="Extension: above 1 against repetition.")
    return_token_ids: bool | None = Field(None, description="Extension: choices carry `token_ids`.")
    structured_outputs: dict[str, Any] | None = Field(
        None, description="Extension: `regex`, `json` or `grammar` (Lark) that the text must fit."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_no_engine_offers(cls, value: Any) -> Any:
        """Beam search and the like are refused under their names, unless they are switched off. Raises ApiError."""
        if not isinstance(value, dict):
            return value
        for name in filter(NOT_OFFERED.__contains__, value):
            try:
                refuse_not_offered({name: value[name]})
            except UnsupportedError as error:
                raise unsupported(name, str(error)) from error
        return {name: each for name, each in value.items() if name not in NOT_OFFERED}

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Function(Body):
    model_config = ConfigDict(extra="ignore")

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    """A function by name, as a tool choice has it."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    """Which of the tools may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class CalledFunction(Body):
    name: str
    arguments: str


class Call(Body):
    model_config = ConfigDict(extra="ignore")

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of a conversation. Fields that say nothing to a model are let through."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    legacy: bool = Field(False, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _read_legacy_key(cls, value: Any) -> Any:
        """`message` was the name of `content` in Chinese-LLaMA-Alpaca's server."""
        if not isinstance(value, dict):
            return value
        read = {key: each for key, each in value.items() if key != "legacy"}
        if "message" in read and "content" not in read:
            read |= {"content": read.pop("message"), "legacy": True}
        return read


class ResponseFormat(Body):
    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class ChatBody(GenerationBody):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    options: dict[str, Any] | None = Field(None, description="Extension: options of an app.")
    # Taken, since they change nothing in an answer.
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None
    # Known, and refused where they ask for something.
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def is_legacy(self) -> bool:
        return any(message.legacy for message in self.messages)


class CompletionBody(GenerationBody):
    """A request to /v1/completions."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=20)
    suffix: str | None = None
    response_format: ResponseFormat | None = Field(None, description="Extension: as in a chat.")

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens get log probabilities."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class EmbeddingBody(Body):
    """A request to /v1/embeddings."""

    input: str | list[str] | TokenIds | list[TokenIds]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        if isinstance(self.input, str):
            return [self.input]
        if self.input and isinstance(self.input[0], int):
            return [self.input]  # type: ignore[list-item]
        return list(self.input)  # type: ignore[arg-type]


class TokenizeBody(Body):
    """A request to /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: Literal[True] = True


class DetokenizeBody(Body):
    """A request to /detokenize."""

    model: str | None = None
    tokens: TokenIds
