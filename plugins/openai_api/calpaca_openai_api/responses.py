"""Responses that are kept: what a request continues, and what its response is found by afterwards."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from calpaca_openai_api.answering import Pieces
from calpaca_openai_api.faults import ApiError, as_api_error, unsupported
from calpaca_openai_api.maker import Maker, lives
from calpaca_openai_api.record import Record
from calpaca_openai_api.response_form import UNFINISHED, ResponseForm
from calpaca_openai_api.response_items import Item
from calpaca_openai_api.response_store import ResponseStore, Stored

MOST_KEPT = 10_000
"""Responses of all keys; the oldest go first."""

SECONDS_KEPT = 30 * 24 * 3600.0
"""As long as OpenAI keeps them."""

MOST_TURNS = 256
"""Responses that one may continue, back to the first."""


def owner_of(record: Record) -> str:
    """Whose responses a request may see: those of its key; without keys there is one owner."""
    return record.key.sha256 if record.key is not None else ""


class Responses:
    """The kept responses in `file`, which is made at the first use. All methods wait for the disk."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._maker = Maker(file)
        self._made_here: set[str] = set()

    @cached_property
    def _store(self) -> ResponseStore:
        return ResponseStore(self._file, MOST_KEPT, SECONDS_KEPT)

    def turns_before(self, owner: str, previous: str | None) -> list[Item]:
        """Inputs and outputs of the responses that `previous` is the last of. Raises ApiError for one that is gone."""
        turns: list[list[Item]] = []
        while previous is not None:
            stored = self._find(owner, previous)
            if stored is None:
                message = f"Previous response with id '{previous}' not found."
                raise ApiError(400, message, param="previous_response_id", code="previous_response_not_found")
            if len(turns) == MOST_TURNS:
                message = f"More than {MOST_TURNS} responses would be continued. Give the turns as 'input'."
                raise ApiError(400, message, param="previous_response_id")
            if stored.response["status"] in UNFINISHED:
                message = f"Previous response with id '{previous}' is not complete yet."
                raise ApiError(400, message, param="previous_response_id", code="previous_response_not_complete")
            turns.append([*stored.input, *stored.response["output"]])
            previous = stored.previous
        return [item for turn in reversed(turns) for item in turn]

    def keep(self, owner: str, response: dict[str, Any], items: list[Item], *, in_background: bool = False) -> None:
        maker = self._maker.name if in_background else None
        if in_background:
            self._made_here.add(response["id"])
        self._store.add(owner, Stored(response, items, response["previous_response_id"], maker))

    def end(self, response: dict[str, Any], events: list[dict[str, Any]]) -> None:
        """Keep the end of a response that was made in the background."""
        try:
            self._store.end(response, events)
        finally:
            self._made_here.discard(response["id"])

    def close(self) -> None:
        """Nothing is made any more."""
        self._maker.end()

    def find(self, owner: str, id: str) -> Stored:
        """Raises ApiError 404."""
        stored = self._find(owner, id)
        if stored is None:
            raise _unknown(id)
        return stored

    def _find(self, owner: str, id: str) -> Stored | None:
        """What is kept. A response whose maker has died has failed, which is written down when somebody asks."""
        stored = self._store.find(owner, id)
        if stored is None or stored.maker is None or self._goes_on(id, stored.maker):
            return stored
        error = {"code": "server_error", "message": "The server ended before the response was complete."}
        failed = {**stored.response, "status": "failed", "error": error}
        failed.pop("usage", None)  # nobody knows it
        self._store.end(failed, [])
        return replace(stored, response=failed, maker=None, events=[])

    def _goes_on(self, id: str, maker: str) -> bool:
        return id in self._made_here if maker == self._maker.name else lives(self._file, maker)

    def delete(self, owner: str, id: str) -> dict[str, Any]:
        """Raises ApiError 404."""
        if not self._store.delete(owner, id):
            raise _unknown(id)
        return {"id": id, "object": "response", "deleted": True}


def _unknown(id: str) -> ApiError:
    return ApiError(404, f"Response with id '{id}' not found.", param="id")


def made_elsewhere(stored: Stored) -> ApiError:
    """What asks for more than the state of a response that another process makes."""
    return ApiError(409, f"Another server makes the response '{stored.response['id']}'; ask it.", param="id")


def item_page(items: list[Item], after: str | None, limit: int, order: Literal["asc", "desc"]) -> dict[str, Any]:
    """OpenAI's ResponseItemList: up to `limit` items that follow the one with the id `after`. Raises ApiError."""
    ordered = items if order == "asc" else items[::-1]
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise ApiError(400, f"There is no item '{after}' to go on after.", param="after")
        ordered = ordered[ids.index(after) + 1 :]
    page = ordered[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else ("", "")
    return {"object": "list", "data": page, "has_more": len(ordered) > limit, "first_id": first, "last_id": last}


def events_after(stored: Stored, after: int) -> list[dict[str, Any]]:
    """The events of a response that was made in the background whose number is above `after`. Raises ApiError.

    Those of one whose maker died are lost, but for its failure.
    """
    if stored.maker is not None:
        raise made_elsewhere(stored)
    if stored.events is None:
        raise unsupported("stream", "only a response that was made in the background can be streamed again.")
    if not stored.events:
        return [{"type": "response.failed", "sequence_number": after + 1, "response": stored.response}]
    return stored.events[after + 1 :]


class Recording:
    """Reads an answer into its form as it passes, and keeps the response before its end is told."""

    def __init__(self, form: ResponseForm, responses: Responses, record: Record, items: list[Item], kept: bool) -> None:
        self._form = form
        self._responses = responses
        self._record = record
        self._items = items
        self._kept = kept

    async def pieces(self, pieces: Pieces) -> Pieces:
        """The pieces. What goes wrong in a stream that has begun becomes the response's end."""
        async with aclosing(pieces):
            try:
                async for piece in pieces:
                    self._form.read(piece)
                    if piece.finish is not None:
                        await self._keep()
                    yield piece
            except Exception as error:
                if not (self._record.streamed and self._form.begun):
                    raise
                fault = as_api_error(error)
                self._record.blame(fault)
                self._form.fail(fault)
                await self._keep()

    async def _keep(self) -> None:
        if self._kept:
            owner = owner_of(self._record)
            await asyncio.to_thread(self._responses.keep, owner, self._form.response, self._items)
