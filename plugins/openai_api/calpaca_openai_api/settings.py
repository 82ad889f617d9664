"""How the server is run: options of `calpaca serve`, and `[plugins.openai_api]` in the settings."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from calpaca.core.errors import UsageError
from calpaca.plugins.options import ModelOptions, SamplingOptions, read_options

DEFAULT_PORT = 8000


class ServeOptions(ModelOptions, SamplingOptions):
    """Options of `calpaca serve`. The sampling options hold for requests that do not say otherwise."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(DEFAULT_PORT, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key_file: Path | None = Field(None, description="File of keys that clients must show, one a line.")
    without_key: bool = Field(False, description="Listen on a public address without asking for a key.")
    strict: bool = Field(False, description="Refuse what OpenAI refuses: no model named, `message` for `content`.")
    max_running: int = Field(64, ge=1, description="Requests that run at once.")
    max_waiting: int = Field(1024, ge=0, description="Requests that may wait; more are refused with 503.")
    max_body: int = Field(8 << 20, ge=1024, description="Longest request, in bytes.")
    drain: float = Field(60.0, ge=0, description="Seconds that running requests get to end in after SIGTERM.")


class KeySettings(BaseModel):
    """A key: what its holder may do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the key: printf %s KEY | sha256sum")
    models: tuple[str, ...] | None = Field(None, description="Models it may use; left out: all.")
    concurrency: int | None = Field(None, ge=1, description="Requests at once; left out: as many as there is room for.")


def read_serve_options(
    typed: Mapping[str, Any], section: Mapping[str, Any]
) -> tuple[ServeOptions, dict[str, KeySettings]]:
    """Options as typed, over those of the settings; and the keys. Raises UsageError."""
    presets = {name: value for name, value in section.items() if name != "keys"}
    try:
        options = read_options(ServeOptions, {**presets, **typed}, "serve")
        keys = TypeAdapter(dict[str, KeySettings]).validate_python(section.get("keys", {}))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"[plugins.openai_api.keys] {place}: {first['msg']}.", "See the plugin's README.") from error
    except UsageError as error:
        raise UsageError(error.message, "See: calpaca serve --help") from error
    assert isinstance(options, ServeOptions)
    if options.api_key_file is not None:
        keys |= _keys_in(options.api_key_file)
    _refuse_open_door(options, keys)
    return options, keys


def _keys_in(file: Path) -> dict[str, KeySettings]:
    try:
        lines = file.expanduser().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The keys in {file} cannot be read: {error}.", "Check --api-key-file.") from error
    if not lines:
        raise UsageError(f"There is no key in {file}.", "Write one a line.")
    return {f"{file.name}:{number}": KeySettings(sha256=digest(key)) for number, key in enumerate(lines, 1)}


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _refuse_open_door(options: ServeOptions, keys: Mapping[str, KeySettings]) -> None:
    if not (keys or options.without_key or is_loopback(options.host)):
        raise UsageError(
            f"{options.host} can be reached from other machines, and there is no key.",
            "Give keys with --api-key-file FILE, or say --without-key.",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
