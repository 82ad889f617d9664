"""The app: routes, and every failure as OpenAI's error object."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from calpaca import __version__
from calpaca.core.engine import Usage
from calpaca.core.errors import CalpacaError
from calpaca.core.model import Model
from calpaca.core.paths import data_dir
from calpaca_openai_api import admin
from calpaca_openai_api.admission import Admission
from calpaca_openai_api.answering import admitted, respond, while_connected
from calpaca_openai_api.app_chat import AppPlan, plan_app
from calpaca_openai_api.background import Background
from calpaca_openai_api.bodies import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from calpaca_openai_api.chat import ChatForm, ChatPlan, plan_chat
from calpaca_openai_api.completions import CompletionForm, plan_completion
from calpaca_openai_api.embeddings import embed, embedding_response
from calpaca_openai_api.faults import UNSUPPORTED, ApiError, as_api_error, busy
from calpaca_openai_api.gate import Gate
from calpaca_openai_api.keys import Keys, refuse_model
from calpaca_openai_api.metrics import Metrics
from calpaca_openai_api.record import Record, record_of
from calpaca_openai_api.response_endpoints import ResponseApi
from calpaca_openai_api.responses import Responses
from calpaca_openai_api.sampling import Defaults
from calpaca_openai_api.served import Served, ServedApp, ServedModel, ServedModels
from calpaca_openai_api.settings import KeySettings, ServeOptions, is_loopback
from calpaca_openai_api.tokenizing import detokenize, tokenize
from calpaca_openai_api.wire import Envelope, Json

LEGACY_HEADERS = {
    "Deprecation": "@1764000000",
    "x-calpaca-notice": "messages carry 'content'; 'message' is its old name",
}
"""On answers to requests with the old key `message` (RFC 9745)."""

_STATUS_CODES = {404: "unknown_url", 405: "method_not_allowed"}


@dataclass(frozen=True)
class Api:
    """The endpoints, over the models that are served."""

    models: ServedModels
    admission: Admission
    metrics: Metrics
    options: ServeOptions
    background: Background

    @property
    def responses(self) -> ResponseApi:
        return ResponseApi(self._find, self.plan_chat, self.admission, self.background.responses, self.background)

    @property
    def defaults(self) -> Defaults:
        return Defaults(self.options, self.models.runtime.settings.sampling)

    # What there is -------------------------------------------------------------------------------------------------
    async def list_models(self, request: Request) -> Response:
        key = record_of(request).key
        allowed = [id for id in self.models.ids if key is None or key.models is None or id in key.models]
        return Json({"object": "list", "data": [self.models.describe(id) for id in allowed]})

    async def show_model(self, id: str) -> Response:
        return Json(self.models.describe(id))

    async def health(self) -> Response:
        """Whether the process is alive."""
        return Json({"status": "ok"})

    async def ready(self) -> Response:
        """Whether it takes requests."""
        if self.admission.draining:
            raise busy("The server is shutting down.", code="shutting_down", seconds=5)
        return Json({"status": "ready"})

    async def show_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # Generation ----------------------------------------------------------------------------------------------------
    async def chat(self, body: ChatBody, request: Request) -> Response:
        return await while_connected(request, self._chat(body, request))

    async def _chat(self, body: ChatBody, request: Request) -> Response:
        served, record = self._find(body.model, request), record_of(request)
        if self.options.strict and body.is_legacy:
            raise ApiError(400, "A message has no 'content'; 'message' is its old name.", param="messages")
        headers = LEGACY_HEADERS if body.is_legacy else {}
        plan = await self.plan_chat(body, served)
        fingerprint = None if isinstance(served, ServedApp) else self._language_model(served).fingerprint
        form = ChatForm(body, Envelope("chatcmpl", served.id, fingerprint))
        pieces = admitted(self.admission, record, plan.pieces)
        return await respond(record, pieces, form, streamed=bool(body.stream), headers=headers)

    async def plan_chat(self, body: ChatBody, served: Served) -> ChatPlan | AppPlan:
        """Raises ApiError."""
        if isinstance(served, ServedApp):
            return await asyncio.to_thread(plan_app, body, served.runs)
        if body.options is not None:
            raise ApiError(400, "'options' are for apps; this is a language model.", param="options")
        plan: ChatPlan = await self._planned(plan_chat, body, self._language_model(served))
        return plan

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        return await while_connected(request, self._complete(body, request))

    async def _complete(self, body: CompletionBody, request: Request) -> Response:
        served, record = self._language_model(self._find(body.model, request)), record_of(request)
        plan = await self._planned(plan_completion, body, served)
        form = CompletionForm(plan, Envelope("cmpl", served.id, served.fingerprint))
        pieces = admitted(self.admission, record, plan.pieces)
        return await respond(record, pieces, form, streamed=bool(body.stream))

    async def _planned(self, plan: Callable[[Any, Model, Defaults], Any], body: Any, served: ServedModel) -> Any:
        """The plan for a request: on the model's engine, or on one of the same weights that does what this one refuses.

        Raises ApiError that names the field which no engine takes.
        """
        model = await served.get()
        try:
            return await asyncio.to_thread(plan, body, model, self.defaults)
        except ApiError as refused:
            for twin in self.models.twins(served) if refused.code == UNSUPPORTED else ():
                with suppress(ApiError):
                    return await asyncio.to_thread(plan, body, twin, self.defaults)
            raise

    # Other endpoints -----------------------------------------------------------------------------------------------
    async def embed(self, body: EmbeddingBody, request: Request) -> Response:
        self._need_model(body.model)
        served = self.models.embedding_model(body.model)
        record = _note_model(request, served)
        concurrency = record.key.concurrency if record.key is not None else None

        async def work() -> Response:
            async with self.admission.slot(record.key_name, concurrency, served.id):
                vectors, tokens = await embed(body, await served.get())
            record.usage = Usage(tokens)
            return Json(embedding_response(body, served.id, vectors, tokens))

        return await while_connected(request, work())

    async def tokenize(self, body: TokenizeBody, request: Request) -> Response:
        model = await self._language_model(self._find(body.model, request)).get()
        return Json(await asyncio.to_thread(tokenize, body, model))

    async def detokenize(self, body: DetokenizeBody, request: Request) -> Response:
        model = await self._language_model(self._find(body.model, request)).get()
        return Json(await asyncio.to_thread(detokenize, body, model))

    # Administration ------------------------------------------------------------------------------------------------
    async def load_adapter(self, body: admin.LoadAdapterBody) -> Response:
        return Json(await asyncio.to_thread(admin.load_adapter, body, self.models))

    async def unload_adapter(self, body: admin.UnloadAdapterBody) -> Response:
        return Json(await asyncio.to_thread(admin.unload_adapter, body, self.models))

    # The model of a request ----------------------------------------------------------------------------------------
    def _find(self, id: str | None, request: Request) -> Served:
        """The model that a request names; the main one where it may leave that out. Raises ApiError."""
        self._need_model(id)
        served = self.models.main if id is None else self.models.find(id)
        _note_model(request, served)
        return served

    def _need_model(self, id: str | None) -> None:
        if id is None and self.options.strict:
            raise ApiError(400, "You must provide a model parameter.", param="model")

    def _language_model(self, served: Served) -> ServedModel:
        return self.models.language_model(served.id)


def _note_model(request: Request, served: Served) -> Record:
    """Note who answers. Raises ApiError 403 for a model that the key is not for."""
    record = record_of(request)
    refuse_model(record.key, served.id)
    record.model = served.id
    return record


def build_app(models: ServedModels, options: ServeOptions, keys: Mapping[str, KeySettings]) -> tuple[ASGIApp, Api]:
    """The whole server as an ASGI app, and its endpoints."""
    admission = Admission(options.max_running, options.max_waiting, options.timeout)
    background = Background(Responses(options.responses or data_dir() / "responses.sqlite"))
    api = Api(models, admission, Metrics(admission), options, background)
    app = FastAPI(title="calpaca", version=__version__, redoc_url=None)
    administered = any("admin" in key.scopes for key in keys.values())
    for method, path, endpoint in (*_routes(api), *(_admin_routes(api) if administered else ())):
        app.add_api_route(path, endpoint, methods=[method], response_class=Response)
    handled = (
        ApiError,
        CalpacaError,
        RecursionError,
        UnicodeEncodeError,
        RequestValidationError,
        HTTPException,
        Exception,
    )
    for kind in handled:
        app.add_exception_handler(kind, _show_error)
    local_only = not keys and not options.without_key and is_loopback(options.host)
    gate: ASGIApp = Gate(app, Keys(keys), api.metrics, options.max_body, local_only)
    return (_for_origins(gate, options.cors_origins) if options.cors_origins else gate), api


def _for_origins(app: ASGIApp, origins: list[str]) -> ASGIApp:
    """Let pages of these web origins ask."""
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"], expose_headers=["*"]
    )


def _routes(api: Api) -> list[tuple[str, str, Any]]:
    responses = api.responses
    return [
        ("GET", "/v1/models", api.list_models),
        ("GET", "/v1/models/{id:path}", api.show_model),
        ("POST", "/v1/chat/completions", api.chat),
        ("POST", "/v1/completions", api.complete),
        ("POST", "/v1/responses", responses.create),
        ("POST", "/v1/responses/input_tokens", responses.count_input),
        ("POST", "/v1/responses/compact", responses.compact),
        ("GET", "/v1/responses/{id}", responses.show),
        ("DELETE", "/v1/responses/{id}", responses.delete),
        ("POST", "/v1/responses/{id}/cancel", responses.cancel),
        ("GET", "/v1/responses/{id}/input_items", responses.list_items),
        ("POST", "/v1/embeddings", api.embed),
        ("POST", "/tokenize", api.tokenize),
        ("POST", "/detokenize", api.detokenize),
        ("GET", "/health", api.health),
        ("GET", "/ready", api.ready),
        ("GET", "/metrics", api.show_metrics),
    ]


def _admin_routes(api: Api) -> list[tuple[str, str, Any]]:
    return [("POST", admin.LOAD, api.load_adapter), ("POST", admin.UNLOAD, api.unload_adapter)]


async def _show_error(request: Request, error: Exception) -> Response:
    fault = _translated(error, request)
    record_of(request).blame(fault)
    return Json(fault.body(), fault.status, fault.headers)


def _translated(error: Exception, request: Request) -> ApiError:
    """The framework's errors, and all others, as ours."""
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        status = error.status_code
        if status == 404:
            return ApiError(404, f"Unknown request URL: {request.method} {request.url.path}.", code="unknown_url")
        message = "The request is no valid JSON." if status == 400 else str(error.detail)
        return ApiError(status, message, code=_STATUS_CODES.get(status), headers=error.headers)
    return as_api_error(error)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first field that is wrong."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "The request is no valid JSON.")
    location = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    field = location[0] if location else None
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"Unrecognized request argument: {'.'.join(location)}.", param=field, code="unknown_parameter"
        )
    if first["type"] == "missing" and field is not None:
        return ApiError(400, f"Missing required parameter: '{field}'.", param=field, code="missing_required_parameter")
    where = f"'{field}'" if field is not None else "the request"
    return ApiError(400, f"Invalid value for {where}: {first['msg']}.", param=field, code="invalid_value")
