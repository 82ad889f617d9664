"""/v1/responses: made at once or in the background, streamed, kept, continued, listed, cancelled and deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from starlette.responses import Response

from calpaca.core.context import fit
from calpaca_openai_api.admission import Admission
from calpaca_openai_api.answering import EventStream, admitted, respond, while_connected
from calpaca_openai_api.app_chat import AppPlan
from calpaca_openai_api.background import Background, Run
from calpaca_openai_api.bodies import ChatBody
from calpaca_openai_api.chat import ChatPlan
from calpaca_openai_api.faults import ApiError, unsupported
from calpaca_openai_api.record import Record, record_of
from calpaca_openai_api.response_body import ResponseBody, refuse_response_fields
from calpaca_openai_api.response_chat import as_chat, renamed
from calpaca_openai_api.response_form import ResponseForm
from calpaca_openai_api.response_items import Item, read_items
from calpaca_openai_api.responses import Recording, Responses, events_after, item_page, made_elsewhere, owner_of
from calpaca_openai_api.served import Served
from calpaca_openai_api.wire import Json, event

Plan = ChatPlan | AppPlan


@dataclass(frozen=True)
class ResponseApi:
    """The endpoints. `find` gives the model of a request, `plan` a chat with it; both raise ApiError."""

    find: Callable[[str | None, Request], Served]
    plan: Callable[[ChatBody, Served], Awaitable[Plan]]
    admission: Admission
    responses: Responses
    background: Background

    async def create(self, body: ResponseBody, request: Request) -> Response:
        return await while_connected(request, self._create(body, request))

    async def _create(self, body: ResponseBody, request: Request) -> Response:
        served, record = self.find(body.model, request), record_of(request)
        refuse_response_fields(body)
        items = read_items(body.input)
        plan, notices = await self._plan(body, items, served, owner_of(record))
        form = ResponseForm(body, served.id, plan.sampling if isinstance(plan, ChatPlan) else None, notices)
        if body.background:
            run = await self._begin(form, plan, record, items)
            return _followed(run.follow(-1)) if body.stream else Json(run.response)
        recording = Recording(form, self.responses, record, items, body.is_kept)
        pieces = recording.pieces(admitted(self.admission, record, plan.pieces))
        return await respond(record, pieces, form, streamed=bool(body.stream))

    async def _begin(self, form: ResponseForm, plan: Plan, record: Record, items: list[Item]) -> Run:
        """Raises ApiError where there is no room for a request more."""
        self.admission.check(record.key_name, record.key.concurrency if record.key is not None else None)

        def pieces() -> Any:
            form.start()  # there is a slot
            return plan.pieces()

        return await self.background.begin(form, record, items, admitted(self.admission, record, pieces))

    async def _plan(
        self, body: ResponseBody, items: list[Item], served: Served, owner: str
    ) -> tuple[Plan, tuple[str, ...]]:
        """The plan, and what the client is told of it. Raises ApiError."""
        before: list[Item] = []
        if body.previous_response_id is not None:
            before = await asyncio.to_thread(self.responses.turns_before, owner, body.previous_response_id)
        try:
            plan = await self.plan(as_chat(body, [*before, *items]), served)
        except ApiError as error:
            raise renamed(error) from error
        if body.truncation != "auto":
            return plan, ()
        if isinstance(plan, AppPlan):
            raise unsupported("truncation", "an app sees to what fits by itself.")
        return await asyncio.to_thread(_truncated, plan)

    async def count_input(self, body: ResponseBody, request: Request) -> Response:
        """How many tokens a request would have as its input."""
        return await while_connected(request, self._count_input(body, request))

    async def _count_input(self, body: ResponseBody, request: Request) -> Response:
        refuse_response_fields(body)
        items = read_items(body.input)
        plan, _ = await self._plan(body, items, self.find(body.model, request), owner_of(record_of(request)))
        if isinstance(plan, AppPlan):
            raise unsupported("model", "what an app asks its model is counted when it has answered.")
        count = await asyncio.to_thread(plan.model.count_tokens, plan.messages, plan.tools)
        return Json({"object": "response.input_tokens", "input_tokens": count})

    async def compact(self) -> Response:
        message = "Conversations are not compacted here. Use 'truncation': 'auto', or give fewer items."
        raise ApiError(404, message, code="unknown_url")

    async def show(
        self,
        id: str,
        request: Request,
        stream: bool = False,
        starting_after: Annotated[int | None, Query(ge=-1)] = None,
        include_obfuscation: bool = False,
    ) -> Response:
        if include_obfuscation:
            raise unsupported("include_obfuscation", "nothing is obfuscated.")
        if starting_after is not None and not stream:
            raise ApiError(400, "'starting_after' is for streams only.", param="starting_after")
        owner, after = owner_of(record_of(request)), -1 if starting_after is None else starting_after
        run = self.background.find(owner, id)
        if run is not None and stream:
            return _followed(run.follow(after))
        if run is not None:
            await run.ended()
            return Json(run.response)
        stored = await asyncio.to_thread(self.responses.find, owner, id)
        return _replayed(events_after(stored, after)) if stream else Json(stored.response)

    async def cancel(self, id: str, request: Request) -> Response:
        """Stop a response that is made in the background; one that has ended is given as it is."""
        owner = owner_of(record_of(request))
        run = self.background.find(owner, id)
        if run is not None:
            await run.stop()
            return Json(run.response)
        stored = await asyncio.to_thread(self.responses.find, owner, id)
        if stored.events is None:
            raise ApiError(400, "Cannot cancel a synchronous response.", param="id")
        if stored.maker is not None:
            raise made_elsewhere(stored)
        return Json(stored.response)

    async def delete(self, id: str, request: Request) -> Response:
        owner = owner_of(record_of(request))
        run = self.background.find(owner, id)
        if run is not None:
            await run.stop()
        return Json(await asyncio.to_thread(self.responses.delete, owner, id))

    async def list_items(
        self,
        id: str,
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        stored = await asyncio.to_thread(self.responses.find, owner_of(record_of(request)), id)
        return Json(item_page(stored.input, after, limit, order))


def _truncated(plan: ChatPlan) -> tuple[ChatPlan, tuple[str, ...]]:
    """The plan without the oldest turns, as few as will do, and what the client is told of them. Takes time: prompts are
    rendered and counted. Raises ContextOverflowError when not even the last turn fits."""
    fitted = fit(
        plan.model, plan.messages, "drop", tools=plan.tools, max_new_tokens=plan.sampling.max_new_tokens
    )  # fmt: skip
    if not fitted.use.dropped:
        return plan, ()
    told = (
        f"Not used, for want of room: the oldest messages ({fitted.use.dropped}, {fitted.use.dropped_tokens} tokens)."
    )
    return replace(plan, messages=[dict(message) for message in fitted.messages]), (told,)


def _followed(events: AsyncGenerator[dict[str, Any], None]) -> EventStream:
    """The events of a response that goes on, also when nobody reads them."""

    async def written() -> AsyncGenerator[bytes, None]:
        async for each in events:
            yield event(each)

    return EventStream(written())


def _replayed(events: list[dict[str, Any]]) -> EventStream:
    async def written() -> AsyncGenerator[bytes, None]:
        for each in events:
            yield event(each)

    return EventStream(written())
