"""CalpacaLLM: a local model as LangChain's plain language model, text in and text out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseLLM, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import ConfigDict, Field, model_validator

import calpaca
from calpaca.core.engine import Chunk, Grammar, Handle, Usage
from calpaca.core.langchain.messages import usage_metadata
from calpaca.core.langchain.parameters import (
    CALL_ARGUMENTS,
    Call,
    ModelParameters,
    all_at_once,
    answering,
    awhole,
    end_info,
    joined,
    logprobs_info,
    whole,
)


class CalpacaLLM(ModelParameters, BaseLLM):
    """Continues a text with a local model.

        llm = CalpacaLLM(model="smollm2-135m-instruct", max_tokens=40)
        llm.invoke("A llama is")

    The text goes to the model as it stands, without a chat template. All prompts of a `batch` run together. Every
    argument of sampling may also be given per call; an unknown one is refused.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    grammar: Grammar | None = Field(None, exclude=True, description="What every answer must look like.")

    @model_validator(mode="after")
    def _set_calpaca_version(self) -> CalpacaLLM:
        self._add_version("calpaca", calpaca.__version__)
        return self

    # What it is ----------------------------------------------------------------------------------------------------
    @property
    def _llm_type(self) -> str:
        return "calpaca"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        identity = self._identity({})
        return {**identity, "grammar": repr(self.grammar)} if self.grammar is not None else identity

    @property
    def lc_attributes(self) -> dict[str, Any]:
        return super().lc_attributes | ({"grammar": asdict(self.grammar)} if self.grammar is not None else {})

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._tracing("llm", stop, kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids by the model's own tokenizer, without special tokens."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._load().engine.encode(text)

    # langchain_core looks into its cache before a call's own arguments are known to the key, so that another
    # temperature would be answered from there. They are therefore made part of the object that is asked. -----------
    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        own, rest = self._with_arguments(kwargs)
        return BaseLLM.generate(own, prompts, stop, callbacks, **rest)

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        own, rest = self._with_arguments(kwargs)
        await asyncio.to_thread(own._load)  # the first time takes seconds
        return await BaseLLM.agenerate(own, prompts, stop, callbacks, **rest)

    def _with_arguments(self, kwargs: Mapping[str, Any]) -> tuple[CalpacaLLM, dict[str, Any]]:
        """A copy with a call's arguments in place of its own, and what else was given."""
        given = {name: kwargs[name] for name in kwargs if name in CALL_ARGUMENTS}
        rest = {name: kwargs[name] for name in kwargs if name not in CALL_ARGUMENTS}
        if not given:
            return self, rest
        if "max_new_tokens" in given:
            given["max_tokens"] = given.pop("max_new_tokens")
        if given.get("model") not in (None, self.model):
            given |= {
                name: type(self).model_fields[name].default for name in ("adapters", "tokenizer", "chat_template")
            }
        return self.model_copy(update=given), rest

    # Answers -------------------------------------------------------------------------------------------------------
    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call, handles = self._submit(prompts, stop, kwargs)
        if self.streaming and run_manager is not None and len(handles) == 1:
            for _ in self._chunks(call, handles[0], run_manager):
                pass
            return _result(call, [joined(handles[0])])
        try:
            return _result(call, [whole(handle, call.timeout) for handle in handles])
        finally:
            _cancel(handles)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call, handles = self._submit(prompts, stop, kwargs)
        if self.streaming and run_manager is not None and len(handles) == 1:
            async for _ in self._achunks(call, handles[0], run_manager):
                pass
            return _result(call, [joined(handles[0])])
        try:
            return _result(call, await asyncio.gather(*(awhole(handle, call.timeout) for handle in handles)))
        finally:
            _cancel(handles)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        call, (handle,) = self._submit([prompt], stop, kwargs)
        yield from self._chunks(call, handle, run_manager)

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        call, (handle,) = self._submit([prompt], stop, kwargs)
        async with aclosing(self._achunks(call, handle, run_manager)) as chunks:
            async for chunk in chunks:
                yield chunk

    def _chunks(
        self, call: Call, handle: Handle, run_manager: CallbackManagerForLLMRun | None
    ) -> Iterator[GenerationChunk]:
        """The answer as it comes; each piece of text is reported once."""
        with answering(handle, call.timeout):
            for chunk in handle:
                piece = _piece(call, chunk)
                if run_manager is not None and chunk.text:
                    run_manager.on_llm_new_token(chunk.text, chunk=piece)
                yield piece

    async def _achunks(
        self, call: Call, handle: Handle, run_manager: AsyncCallbackManagerForLLMRun | None
    ) -> AsyncGenerator[GenerationChunk, None]:
        with answering(handle, call.timeout):
            async for chunk in handle:
                piece = _piece(call, chunk)
                if run_manager is not None and chunk.text:
                    await run_manager.on_llm_new_token(chunk.text, chunk=piece)
                yield piece

    def _submit(
        self, prompts: list[str], stop: list[str] | None, arguments: Mapping[str, Any]
    ) -> tuple[Call, list[Handle]]:
        """Start a request for every prompt. When one is refused, none runs."""
        call = self._call(stop, arguments)
        grammar = arguments.get("grammar", self.grammar)
        handles: list[Handle] = []
        try:
            for prompt in prompts:
                handles.append(call.model.generate(prompt, call.sampling, grammar=grammar))
        except BaseException:
            _cancel(handles)
            raise
        return call, handles

    # Many at once --------------------------------------------------------------------------------------------------
    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Ask all at once; with `return_exceptions`, one that fails does not take the others with it."""
        if return_exceptions:
            return Runnable.batch(self, inputs, all_at_once(config, len(inputs)), return_exceptions=True, **kwargs)
        return super().batch(inputs, config, **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        if return_exceptions:
            return await Runnable.abatch(self, inputs, config, return_exceptions=True, **kwargs)
        return await super().abatch(inputs, config, **kwargs)


def _cancel(handles: list[Handle]) -> None:
    for handle in handles:
        handle.cancel()


def _piece(call: Call, chunk: Chunk) -> GenerationChunk:
    info: dict[str, Any] = {"logprobs": logprobs_info(chunk.logprobs)} if chunk.logprobs else {}
    if chunk.finish_reason is not None:
        info |= end_info(chunk, call.model)
        info["usage_metadata"] = usage_metadata(chunk.usage or Usage())
    return GenerationChunk(text=chunk.text, generation_info=info or None)


def _result(call: Call, answers: list[Chunk]) -> LLMResult:
    usage = sum((answer.usage or Usage() for answer in answers), Usage())
    generations = [Generation(**_piece(call, answer).model_dump(exclude={"type"})) for answer in answers]
    output = {"model_name": call.model.name, "token_usage": usage_metadata(usage)}
    return LLMResult(generations=[[generation] for generation in generations], llm_output=output)
