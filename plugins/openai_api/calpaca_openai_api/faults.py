"""Errors as OpenAI's clients expect them: a status, and an object with message, type, param and code."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from calpaca.core.errors import (
    AdapterError,
    CalpacaError,
    ContextOverflowError,
    DownloadError,
    ModelNotFoundError,
    UnsupportedError,
    UsageError,
)

log = logging.getLogger("calpaca")

UNSUPPORTED = "unsupported_parameter"
"""The code for a field that is known and cannot be honoured."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is no success. `param` names the field of the request that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's ErrorResponse."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unsupported(field: str, why: str) -> ApiError:
    """A field that is known and cannot be honoured; nothing is ignored in silence."""
    return ApiError(400, f"'{field}' is not supported: {why}", param=field, code=UNSUPPORTED)


def busy(message: str, *, status: int = 503, code: str = "overloaded", seconds: int = 1) -> ApiError:
    """Refused for now; clients try again after `seconds`."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(seconds), "x-should-retry": "true"})


def out_of_time(seconds: float) -> ApiError:
    """A client that tried again would only ask for the same work once more, so it is told not to."""
    message = f"The request took longer than {seconds:g} s. Ask for a shorter answer, or stream it in parts."
    return ApiError(504, message, code="timeout", headers={"x-should-retry": "false"})


def unknown_model(name: str, known: Sequence[str]) -> ApiError:
    message = f"The model '{name}' does not exist or is not served here. Served: {', '.join(known)}."
    return ApiError(404, message, param="model", code="model_not_found")


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as what the client is told. What nobody foresaw is logged and not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CalpacaError):
        return _from_core(error)
    if isinstance(error, RecursionError):
        return ApiError(400, "The request is nested too deeply.")
    if isinstance(error, UnicodeEncodeError):
        return ApiError(400, "The request holds text that is no valid Unicode.")
    log.error("A request failed unexpectedly: %s: %s", type(error).__name__, error, exc_info=error)
    return ApiError(500, "The server had an error while processing your request.")


def _from_core(error: CalpacaError) -> ApiError:
    match error:
        case ContextOverflowError():
            return _overflow(error)
        case UnsupportedError():
            return ApiError(400, _text(error), code=UNSUPPORTED)
        case ModelNotFoundError() | AdapterError():  # an adapter was unloaded while the request waited
            return ApiError(404, error.message, param="model", code="model_not_found")
        case UsageError():
            return ApiError(400, _text(error))
        case DownloadError():
            return busy(error.message, code="model_unavailable", seconds=10)
    return ApiError(500, error.message)


def _text(error: CalpacaError) -> str:
    """Message and hint, unless the hint is about the command line."""
    return error.message if "--" in error.hint else str(error)


def _overflow(error: ContextOverflowError) -> ApiError:
    message = (
        f"This model's maximum context length is {error.context_length} tokens. However, you requested "
        f"{error.prompt_tokens + error.max_new_tokens} tokens ({error.prompt_tokens} in the prompt, "
        f"{error.max_new_tokens} in the completion). Please shorten the prompt or the completion."
    )
    return ApiError(400, message, code="context_length_exceeded")
