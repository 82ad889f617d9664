"""API keys: who may ask, and for which models. Only digests of keys are kept."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from calpaca_openai_api import admin
from calpaca_openai_api.faults import ApiError
from calpaca_openai_api.settings import KeySettings, digest

_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class Keys:
    """The keys of a server, by name; without any, everybody may ask."""

    def __init__(self, keys: Mapping[str, KeySettings]) -> None:
        self._keys = dict(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, authorization: str | None) -> tuple[str, KeySettings | None]:
        """Name and settings of the key in an Authorization header. Raises ApiError 401."""
        if not self._keys:
            return "", None
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'."
            raise ApiError(401, message, code="invalid_api_key", headers=_CHALLENGE)
        shown, found = digest(key.strip()), None
        for name, settings in self._keys.items():
            if hmac.compare_digest(settings.sha256, shown):
                found = name
        if found is None:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key", headers=_CHALLENGE)
        return found, self._keys[found]


def refuse_model(key: KeySettings | None, model: str) -> None:
    """Raise ApiError 403 for a model that a key is not for."""
    if key is not None and key.models is not None and model not in key.models:
        message = f"This key is not for the model '{model}'. It is for: {', '.join(key.models)}."
        raise ApiError(403, message, param="model", code="model_not_allowed")


def refuse_path(key: KeySettings | None, path: str) -> None:
    """Raise ApiError 403 for what a key is not for."""
    scope = "admin" if path in admin.PATHS else "metrics" if path == "/metrics" else "inference"
    if key is not None and scope not in key.scopes:
        raise ApiError(403, f"This key is not for {path}: it lacks the scope '{scope}'.", code="insufficient_scope")
