"""HTTP to one kind of server: the key, time limits, proxies, and transport errors as ours."""

from __future__ import annotations

from typing import Any

import httpx

from calpaca import __version__
from calpaca.core.errors import ModelError, UsageError
from calpaca.core.settings import RemoteSettings

_HERE = ("all://localhost", "all://127.0.0.1", "all://[::1]")
_LARGEST_ERROR = 1 << 20


def client_options(settings: RemoteSettings, api_key: str | None) -> dict[str, Any]:
    """Arguments of httpx's clients. Proxies are the environment's (HTTPS_PROXY, NO_PROXY), never for this machine."""
    headers = {"User-Agent": f"calpaca/{__version__}"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return {
        "headers": headers,
        "timeout": httpx.Timeout(settings.timeout, connect=settings.connect_timeout, pool=None),
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
        "mounts": dict.fromkeys(_HERE),
    }


def async_client(settings: RemoteSettings, api_key: str | None) -> httpx.AsyncClient:
    """Raises UsageError when the environment names a proxy that cannot be used."""
    try:
        return httpx.AsyncClient(**client_options(settings, api_key))
    except (ImportError, ValueError) as error:
        raise UsageError(f"The proxy of the environment cannot be used: {error}", "Correct HTTPS_PROXY.") from error


async def read_bounded(response: httpx.Response) -> bytes:
    """A body that should be small, cut off where it is not."""
    content = b""
    async for part in response.aiter_bytes():
        content += part
        if len(content) > _LARGEST_ERROR:
            break
    return content


def reason(error: Exception) -> str:
    """What went wrong on the way, in a few words."""
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection in time"
    text = str(error).split("\n", maxsplit=1)[0]
    return text or type(error).__name__


def silent(where: str, seconds: float) -> ModelError:
    """The error for a server that accepts a request and then says nothing."""
    return ModelError(
        f"The server {where} gave no sign of life for {seconds:g} s.", "Raise timeout in [remote], or ask for less."
    )
