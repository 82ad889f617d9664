"""Requests to engines: started off the event loop, read on it, and cancelled when nobody reads any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from calpaca.core.engine import Chunk, Handle, Usage
from calpaca.core.tools import ToolCall
from calpaca_openai_api.faults import ApiError
from calpaca_openai_api.tokens import Token


@dataclass(frozen=True)
class Piece:
    """What is new of one choice. The first piece has the prompt's tokens where they were scored, the last one a finish
    reason and the usage."""

    index: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    token_ids: tuple[int, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    finish: str | None = None
    stop: str | None = None
    usage: Usage | None = None
    prompt: tuple[Token, ...] = ()
    extension: dict[str, object] = field(default_factory=dict)


async def started(start: Callable[[], list[Handle]]) -> list[Handle]:
    """Start requests in a thread: prompts are rendered and grammars compiled there.

    A caller that is cancelled meanwhile leaves nothing running.
    """
    work = asyncio.get_running_loop().run_in_executor(None, start)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_cancel_all)
        raise


def _cancel_all(work: asyncio.Future[list[Handle]]) -> None:
    if not work.cancelled() and work.exception() is None:
        for handle in work.result():
            handle.cancel()


async def chunks_of(handles: Sequence[Handle]) -> AsyncIterator[tuple[int, Chunk]]:
    """Chunks of all requests as they come, with the position of theirs. Closing the iterator cancels them all."""
    queue: asyncio.Queue[tuple[int, Chunk] | BaseException] = asyncio.Queue()

    async def read(index: int, handle: Handle) -> None:
        try:
            async for chunk in handle:
                queue.put_nowait((index, chunk))
        except Exception as error:
            queue.put_nowait(error)

    readers = [asyncio.create_task(read(index, handle)) for index, handle in enumerate(handles)]
    try:
        left = len(handles)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item[1].finish_reason == "cancelled":
                raise ApiError(503, "The model was unloaded while it answered.", code="model_unavailable")
            left -= item[1].finish_reason is not None
            yield item
    finally:
        for handle in handles:
            handle.cancel()
        for reader in readers:
            reader.cancel()


async def generated(start: Callable[[], list[Handle]]) -> AsyncIterator[tuple[int, Chunk]]:
    """Start requests and read them."""
    async with aclosing(chunks_of(await started(start))) as chunks:  # type: ignore[type-var]
        async for item in chunks:
            yield item


def total_usage(usages: Sequence[Usage]) -> Usage:
    """Usage of several answers to one prompt: the prompt counts once."""
    if not usages:
        return Usage()
    return Usage(
        usages[0].prompt_tokens,
        sum(usage.completion_tokens for usage in usages),
        usages[0].cached_tokens,
        any(usage.estimated for usage in usages),
    )
