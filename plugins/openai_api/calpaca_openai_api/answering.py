"""From pieces of an answer to a response: whole or streamed, and stopped when the client has gone.

An answer is one asynchronous iterator of pieces, which holds its slot and its requests to the engine. A whole response
collects what a streamed one passes on, so that the two cannot differ; closing the iterator frees everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from calpaca.core.engine import Usage
from calpaca_openai_api.admission import Admission
from calpaca_openai_api.faults import as_api_error, out_of_time
from calpaca_openai_api.generation import Piece
from calpaca_openai_api.record import Record
from calpaca_openai_api.wire import DONE, Json, event

Pieces = AsyncGenerator[Piece, None]
Headers = Mapping[str, str] | None

CLIENT_GONE = 499
"""The status that the log gives a request whose client did not wait; nobody receives it."""

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Form(Protocol):
    """How an endpoint writes an answer down."""

    def whole(self, pieces: list[Piece]) -> dict[str, Any]: ...

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]: ...

    def last_events(self) -> Iterator[dict[str, Any]]:
        """What follows when all choices are complete."""
        ...

    def usage(self) -> Usage:
        """What has been counted by now."""
        ...


async def admitted(admission: Admission, record: Record, pieces: Callable[[], AsyncIterator[Piece]]) -> Pieces:
    """The pieces, begun once there is a slot, and noted in the record. Raises ApiError 504 when the time is up."""
    answer = _in_a_slot(admission, record, pieces)
    end = asyncio.get_running_loop().time() + admission.timeout
    async with aclosing(answer):
        while True:
            try:
                # Around each piece, since the next may be for another task.
                async with asyncio.timeout_at(end) as limit:
                    piece = await anext(answer)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if not limit.expired():
                    raise
                raise out_of_time(admission.timeout) from None
            yield piece


async def _in_a_slot(admission: Admission, record: Record, pieces: Callable[[], AsyncIterator[Piece]]) -> Pieces:
    concurrency = record.key.concurrency if record.key is not None else None
    async with (
        admission.slot(record.key_name, concurrency, record.model),
        aclosing(pieces()) as answer,  # type: ignore[type-var]
    ):
        async for piece in answer:
            record.mark_first()
            yield piece


async def respond(record: Record, pieces: Pieces, form: Form, *, streamed: bool, headers: Headers = None) -> Response:
    """The response. What goes wrong before the first piece is an error of its own, not one in a stream."""
    record.streamed = streamed
    if streamed:
        return await _begun(pieces, form, headers)
    async with aclosing(pieces):
        answer = form.whole([piece async for piece in pieces])
    record.usage = form.usage()
    return Json(answer, headers=headers)


async def _begun(pieces: Pieces, form: Form, headers: Headers) -> Response:
    try:
        first = await anext(pieces, None)
    except BaseException:
        await pieces.aclose()
        raise
    return AnswerStream(first, pieces, form, headers)


async def while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do the work, and stop it at once when the client goes away."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return Response(status_code=CLIENT_GONE)
    finally:
        await _ended(task, watcher)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have put everything away."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. A client that goes away ends them; an error becomes the last event but `[DONE]`."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Headers = None) -> None:
        super().__init__(headers={**_STREAM_HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        sender = asyncio.create_task(self._send(send, record))
        watcher = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
            else:
                record.error = "client gone"
        finally:
            await _ended(sender, watcher)
            await self._put_away(record)

    async def _put_away(self, record: Record) -> None:  # noqa: ARG002
        """What follows in any case."""
        await self._events.aclose()

    async def _send(self, send: Send, record: Record) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._frames(record):
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frames(self, record: Record) -> AsyncIterator[bytes]:
        try:
            async for data in self._events:
                yield data
        except Exception as error:
            fault = as_api_error(error)
            record.blame(fault)
            yield event(fault.body())
        yield DONE


class AnswerStream(EventStream):
    """An answer as a stream: a client that goes away ends the work."""

    def __init__(self, first: Piece | None, pieces: Pieces, form: Form, headers: Headers = None) -> None:
        super().__init__(self._written(first), headers)
        self._pieces = pieces
        self._form = form

    async def _written(self, first: Piece | None) -> AsyncGenerator[bytes, None]:
        if first is not None:
            yield b"".join(map(event, self._form.events(first)))
        async for piece in self._pieces:
            yield b"".join(map(event, self._form.events(piece)))
        yield b"".join(map(event, self._form.last_events()))

    async def _put_away(self, record: Record) -> None:
        await super()._put_away(record)
        await self._pieces.aclose()  # in case nothing was read of them
        record.usage = self._form.usage()
