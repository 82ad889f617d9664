"""ChatCalpaca: a local model as LangChain's chat model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import ConfigDict, Field, field_validator, model_validator

import calpaca
from calpaca.core.catalogue import ENTRIES
from calpaca.core.context import CONVERSATION_POLICIES, ContextPolicy, check_policy, fit
from calpaca.core.engine import Chunk, Grammar, Handle
from calpaca.core.errors import UsageError, unknown_name
from calpaca.core.langchain.messages import AnswerReader, plain_messages
from calpaca.core.langchain.parameters import Call, ModelParameters, all_at_once, answering, awhole, whole
from calpaca.core.model import Model
from calpaca.core.spec import ModelSpec
from calpaca.core.tools import CallReader, answer_grammar, describe_format, read_choice

ToolLike = dict[str, Any] | type | Callable[..., Any] | BaseTool
Method = Literal["json_schema", "function_calling", "json_mode"]

CHAT_ARGUMENTS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "response_format", "context_policy"})
_CORE_ARGUMENTS = frozenset({"stream", "ls_structured_output_format", "structured_output_format"})
"""Arguments that langchain_core reads itself and passes on."""


class ChatCalpaca(ModelParameters, BaseChatModel):
    """Chats with a local model.

        llm = ChatCalpaca(model="smollm2-135m-instruct", temperature=0.7)
        llm.invoke("What is a llama?").content

    Names are checked at once, weights are loaded at the first call and shared by all objects that name the same model.
    Every argument of sampling may also be given per call; an unknown one is refused. Calls that run at the same time
    (`batch`, threads, asyncio) share the engine's forward passes. `response_metadata["context"]` says what was sent and,
    under the policies `drop` and `summarise`, what was left out; see `calpaca.core.context`.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    context_policy: ContextPolicy = Field(
        "error",
        description=f"What happens to a conversation longer than the context: {', '.join(CONVERSATION_POLICIES)}.",
    )

    @field_validator("context_policy", mode="before")
    @classmethod
    def _known_policy(cls, value: Any) -> ContextPolicy:
        return check_policy(value)

    @model_validator(mode="after")
    def _set_calpaca_version(self) -> ChatCalpaca:
        self._add_version("calpaca", calpaca.__version__)
        return self

    # What it is ----------------------------------------------------------------------------------------------------
    @property
    def _llm_type(self) -> str:
        return "calpaca-chat"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return self._identity({})

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """The cache's key: contents of the weights and all arguments, those of the call included."""
        rest = {name: kwargs[name] for name in kwargs if name in CHAT_ARGUMENTS or name == "grammar"}
        policy = {"context_policy": self.context_policy}
        identity = {**self._identity(kwargs), **policy, **rest, "_type": self._llm_type, "call_stop": stop}
        return json.dumps(identity, sort_keys=True, default=repr, ensure_ascii=False)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._tracing("chat", stop, kwargs)

    def _resolve_model_profile(self) -> ModelProfile | None:
        """What is known without loading the weights."""
        profile = ModelProfile(
            text_inputs=True, text_outputs=True, image_inputs=False, audio_inputs=False, video_inputs=False,
            pdf_inputs=False, tool_calling=True, tool_choice=True, tool_call_streaming=True, structured_output=True,
            open_weights=True,
        )  # fmt: skip
        length = self._context_length()
        if length is not None:
            profile["max_input_tokens"] = profile["max_output_tokens"] = length
        return profile

    def _context_length(self) -> int | None:
        """From the loaded model where there is one, else from the catalogue or the folder's configuration."""
        loaded: Model | None = self._runtime().loaded(self.spec)
        if loaded is not None:
            return loaded.context_length
        spec: ModelSpec = self._runtime().check(self.spec)
        name = spec.model
        if not self._runtime().is_local(spec):
            return None
        if name in ENTRIES:
            return ENTRIES[name].context_length
        return configured_context_length(name) if name is not None else None

    def _load(self, name: str | None = None) -> Model:
        """The model; once it is loaded, its context length is known to the profile."""
        model = super()._load(name)
        length = model.context_length
        if self.profile is not None and length is not None and name in (None, self.model):
            self.profile.setdefault("max_input_tokens", length)
            self.profile.setdefault("max_output_tokens", length)
        return model

    # Tokens --------------------------------------------------------------------------------------------------------
    def get_token_ids(self, text: str) -> list[int]:
        """Token ids by the model's own tokenizer, without special tokens."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._load().engine.encode(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of the whole prompt, as the chat template renders messages and tools."""
        schemas = [convert_to_openai_tool(tool) for tool in tools or ()]
        return self._load().count_tokens(plain_messages(messages), schemas)

    # Answers -------------------------------------------------------------------------------------------------------
    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002  # langchain_core reports the tokens
        **kwargs: Any,
    ) -> ChatResult:
        call, handle, reader = self._submit(messages, stop, kwargs)
        return _result(reader, whole(handle, call.timeout))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> ChatResult:
        call, handle, reader = await self._asubmit(messages, stop, kwargs)
        return _result(reader, await awhole(handle, call.timeout))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call, handle, reader = self._submit(messages, stop, kwargs)
        with answering(handle, call.timeout):
            for chunk in handle:
                yield from reader.read(chunk)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        call, handle, reader = await self._asubmit(messages, stop, kwargs)
        with answering(handle, call.timeout):
            async for chunk in handle:
                for each in reader.read(chunk):
                    yield each

    def _submit(
        self, messages: list[BaseMessage], stop: list[str] | None, arguments: Mapping[str, Any]
    ) -> tuple[Call, Handle, AnswerReader]:
        """Start the request; what it asks for decides how its answer is read."""
        call = self._call(stop, arguments, extra=CHAT_ARGUMENTS | _CORE_ARGUMENTS)
        plain = plain_messages(messages)
        tools: Sequence[Mapping[str, Any]] = arguments.get("tools") or ()
        choice = read_choice(arguments.get("tool_choice"), tools)
        shown = () if choice == "none" else tools
        response_format = arguments.get("response_format")
        grammar = arguments.get("grammar") or answer_grammar(
            shown,
            choice,
            response_format,
            tokens=call.sampling.max_new_tokens or 512,
            several=arguments.get("parallel_tool_calls") is not False,
        )
        if response_format is not None:
            plain = [*describe_format(response_format), *plain]
        policy: ContextPolicy = arguments.get("context_policy") or self.context_policy
        fitted = fit(call.model, plain, policy, tools=shown, max_new_tokens=call.sampling.max_new_tokens)
        handle = call.model.chat(fitted.messages, call.sampling, tools=shown, grammar=grammar)
        forced = grammar is not None and grammar.kind == "json_schema"
        reader = CallReader(forced=forced) if shown and not isinstance(arguments.get("grammar"), Grammar) else None
        return call, handle, AnswerReader(call.model, reader, fitted.use)

    async def _asubmit(
        self, messages: list[BaseMessage], stop: list[str] | None, arguments: Mapping[str, Any]
    ) -> tuple[Call, Handle, AnswerReader]:
        """`_submit`, in a thread where the model may have to write a summary first."""
        if (arguments.get("context_policy") or self.context_policy) == "summarise":
            return await asyncio.to_thread(self._submit, messages, stop, arguments)
        return self._submit(messages, stop, arguments)

    # Many at once, and without holding up an event loop ------------------------------------------------------------
    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Ask all at once, so that they share the engine's forward passes; `max_concurrency` limits that."""
        if not inputs:
            return []
        self._load(kwargs.get("model"))  # once, before the threads wait for it
        return super().batch(inputs, all_at_once(config, len(inputs)), return_exceptions=return_exceptions, **kwargs)

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        await asyncio.to_thread(self._load, kwargs.get("model"))  # the first time takes seconds
        return await super().ainvoke(input, config, stop=stop, **kwargs)

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        await asyncio.to_thread(self._load, kwargs.get("model"))
        async with aclosing(super().astream(input, config, stop=stop, **kwargs)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk

    # Tools and structured output -----------------------------------------------------------------------------------
    def bind_tools(
        self,
        tools: Sequence[ToolLike],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools.

        `tool_choice` is `auto` (the default: it may), `any` or `required` (it must), a tool's name (it must call that
        one), `none`, True or OpenAI's object. A call always fits its tool's schema. `strict` makes every argument
        required. Raises UsageError for a tool that there is not.
        """
        schemas = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        read_choice(tool_choice, schemas)
        given = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        return self.bind(tools=schemas, **{name: value for name, value in given.items() if value is not None}, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answer with an object that fits a schema: a pydantic class gives its instances, all else gives dicts.

        Decoding is constrained, so any model answers with valid JSON; a text or list without a limit of its own gets
        one under which the whole fits `max_tokens`. `function_calling` asks for a call of a tool with this schema,
        `json_mode` differs from `json_schema` in that the schema may be left out. `include_raw` gives a dict with
        `raw`, `parsed` and `parsing_error`. Raises UsageError for another method or a missing schema.
        """
        if method not in ("json_schema", "function_calling", "json_mode"):
            raise UsageError(*unknown_name("method", method, ("json_schema", "function_calling", "json_mode")))
        if schema is None and method != "json_mode":
            raise UsageError(f"The method '{method}' needs a schema.", "Give one, or use method='json_mode'.")
        traced = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
        if method == "function_calling":
            assert schema is not None
            llm, parser = self._by_tool(schema, strict, traced, kwargs)
        else:
            llm, parser = self._by_format(schema, strict, traced, kwargs)
        if not include_raw:
            return llm | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=llm) | parsed.with_fallbacks([unparsed], exception_key="parsing_error")

    def _by_tool(
        self, schema: dict[str, Any] | type, strict: bool | None, traced: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[Runnable[LanguageModelInput, AIMessage], BaseOutputParser[Any]]:
        name = convert_to_openai_tool(schema)["function"]["name"]
        llm = self.bind_tools(
            [schema], tool_choice=name, strict=strict, ls_structured_output_format=traced if schema else None, **kwargs
        )
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            return llm, PydanticToolsParser(tools=[schema], first_tool_only=True)
        return llm, JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)

    def _by_format(
        self, schema: dict[str, Any] | type | None, strict: bool | None, traced: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[Runnable[LanguageModelInput, AIMessage], BaseOutputParser[Any]]:
        if schema is None:
            return self.bind(response_format={"type": "json_object"}, **kwargs), JsonOutputParser()
        wanted = convert_to_json_schema(schema, strict=strict)
        response_format = {
            "type": "json_schema",
            "json_schema": {"name": wanted.get("title", "answer"), "schema": wanted},
        }
        llm = self.bind(response_format=response_format, ls_structured_output_format=traced, **kwargs)
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            return llm, PydanticOutputParser(pydantic_object=schema)
        return llm, JsonOutputParser()


def _result(reader: AnswerReader, answer: Chunk) -> ChatResult:
    return generate_from_stream(reader.read(answer))


def configured_context_length(folder: str) -> int | None:
    """What a model folder's config.json says; None where there is no folder or it does not say."""
    with suppress(OSError, ValueError):
        config = json.loads((Path(folder).expanduser() / "config.json").read_text(encoding="utf-8"))
        length = config.get("max_position_embeddings")
        return int(length) if length else None
    return None
