"""Responses that are made whether or not anybody waits for them."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from calpaca_openai_api.answering import Pieces
from calpaca_openai_api.faults import ApiError, as_api_error
from calpaca_openai_api.record import Record
from calpaca_openai_api.response_form import UNFINISHED, ResponseForm
from calpaca_openai_api.response_items import Item
from calpaca_openai_api.responses import Responses, owner_of

log = logging.getLogger("calpaca")

SHUT_DOWN = ApiError(503, "The server was shut down before the response was complete.", code="shutting_down")


class Run:
    """One response under way. Its events are kept, so that they can be followed from any one on."""

    def __init__(self, form: ResponseForm, record: Record, responses: Responses) -> None:
        self.owner = owner_of(record)
        self._form = form
        self._record = record
        self._responses = responses
        self._events: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self._ended = False
        self._fault: ApiError | None = None
        form.queue()
        self._tell(form.last_events())

    @property
    def response(self) -> dict[str, Any]:
        """The response as it stands now."""
        return self._form.response

    def begin(self, pieces: Pieces) -> asyncio.Task[None]:
        """Make it, as a task of its own."""
        self.task = self._record.work = asyncio.create_task(self._make(pieces))
        return self.task

    async def stop(self, fault: ApiError | None = None) -> None:
        """End the work at once: the response is cancelled, or has failed with `fault`. One that has ended stays so."""
        if self.response["status"] in UNFINISHED:
            self._fault = fault
            self.task.cancel()
        await asyncio.wait([self.task])

    async def follow(self, after: int) -> AsyncGenerator[dict[str, Any], None]:
        """The events whose number is above `after`, as they come."""
        position = after + 1
        while True:
            changed, ended = self._changed, self._ended
            for event in self._events[position:]:
                position += 1
                yield event
            if ended:
                return
            await changed.wait()

    async def ended(self) -> None:
        """Wait for what is kept of a response whose work has ended; others know of its end after that."""
        if self.response["status"] not in UNFINISHED:
            await asyncio.wait([self.task])

    async def _make(self, pieces: Pieces) -> None:
        await self._read(pieces)
        self._record.usage = self._form.usage()
        last = list(self._form.last_events())
        try:
            await asyncio.to_thread(self._responses.end, self.response, self._events + last)
        except (sqlite3.Error, OSError) as error:
            log.error("The end of %s could not be kept: %s", self.response["id"], error)
        finally:
            self._ended = True
            self._tell(last)

    async def _read(self, pieces: Pieces) -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    self._form.read(piece)
                    if piece.finish is None:
                        self._tell(self._form.last_events())
        except asyncio.CancelledError:
            if self._fault is None:
                self._form.cancel()
            else:
                self._form.fail(self._fault)
        except Exception as error:
            fault = as_api_error(error)
            self._record.blame(fault)
            self._form.fail(fault)

    def _tell(self, events: Iterable[dict[str, Any]]) -> None:
        """Let followers have more events."""
        self._events += events
        self._changed.set()
        self._changed = asyncio.Event()


class Background:
    """The responses that this process makes now. All calls come from one event loop."""

    def __init__(self, responses: Responses) -> None:
        self.responses = responses
        self._runs: dict[str, Run] = {}

    async def begin(self, form: ResponseForm, record: Record, items: list[Item], pieces: Pieces) -> Run:
        """Keep a response that is queued, and make it."""
        run = Run(form, record, self.responses)
        id = run.response["id"]
        await asyncio.to_thread(self.responses.keep, run.owner, run.response, items, in_background=True)
        self._runs[id] = run
        run.begin(pieces).add_done_callback(lambda _: self._runs.pop(id, None))
        return run

    def find(self, owner: str, id: str) -> Run | None:
        """The owner's response of that id, if it is being made here."""
        run = self._runs.get(id)
        return run if run is not None and run.owner == owner else None

    async def end(self, seconds: float) -> None:
        """Let responses end, and stop those that have not within that time: they have failed."""
        runs = list(self._runs.values())
        if runs:
            await asyncio.wait([run.task for run in runs], timeout=seconds)
        await asyncio.gather(*(run.stop(SHUT_DOWN) for run in runs))
        await asyncio.to_thread(self.responses.close)
