"""Addresses of servers: what a person writes, what requests go to, and what may be shown."""

from __future__ import annotations

import os
from dataclasses import dataclass

import httpx

from calpaca.core.errors import UsageError
from calpaca.core.settings import RemoteSettings
from calpaca.core.spec import is_address

_EXAMPLE = "Write it as http://host:8000/v1."


@dataclass(frozen=True)
class Address:
    """Where an OpenAI-compatible API begins. `shown` is `url` without a user's name and password."""

    url: str
    shown: str

    @property
    def root(self) -> str:
        """The server's own root, below which lies what is not OpenAI's: no `/v1` at the end."""
        return self.url.removesuffix("/v1")


def read_address(text: str) -> Address:
    """An address as it is typed; `/v1` may be left out where nothing follows the host. Raises UsageError."""
    try:
        url = httpx.URL(text.strip())
    except httpx.InvalidURL as error:
        raise UsageError(f"'{text}' is no address of a server: {error}.", _EXAMPLE) from error
    if not is_address(str(url)) or not url.host or url.query:
        shown = url.copy_with(username=None, password=None)
        raise UsageError(f"'{shown}' is no address of an OpenAI-compatible server.", _EXAMPLE)
    path = url.path.rstrip("/") or "/v1"
    url = url.copy_with(path=path, fragment=None)
    return Address(str(url), str(url.copy_with(username=None, password=None)))


def find_servers(reference: str | None, settings: RemoteSettings) -> tuple[tuple[Address, ...], str | None]:
    """The servers to ask, and the model's name there; None is the only one that they offer.

    `reference` is such a name, for the servers of the settings, or `http://host:8000/v1#name`. Raises UsageError when
    there is no server to ask.
    """
    if reference is not None and is_address(reference):
        address, _, model = reference.partition("#")
        return (read_address(address),), model or None
    if not settings.endpoints:
        raise UsageError(
            "The engine 'remote' knows no server to ask.",
            "Name the model with its server (--model http://host:8000/v1#name), or set endpoints in [remote].",
        )
    return tuple(dict.fromkeys(map(read_address, settings.endpoints))), reference


def read_api_key(settings: RemoteSettings) -> str | None:
    """The key from CALPACA_API_KEY, else from the settings' file. Raises UsageError for a file without one."""
    key = os.environ.get("CALPACA_API_KEY", "").strip()
    if key or settings.api_key_file is None:
        return key or None
    path = settings.api_key_file.expanduser()
    try:
        key = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The key's file {path} cannot be read: {error}.", "Correct api_key_file in [remote]."
        ) from error
    if not key or not key.isascii() or not key.isprintable():
        raise UsageError(f"{path} holds no key.", "It must hold the key on one line and nothing else.")
    return key
