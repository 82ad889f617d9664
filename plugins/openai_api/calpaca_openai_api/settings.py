"""How the server is run: options of `calpaca serve`, and `[plugins.openai_api]` in the settings."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from calpaca.core.errors import UsageError
from calpaca.core.spec import AdapterSpec, ModelSpec
from calpaca.plugins.options import Flag, ModelOptions, SamplingOptions, read_options

DEFAULT_PORT = 8000


_NAMED = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)=(?P<adapter>.+)")


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
    timeout: float = Field(
        600.0, gt=0, description="Seconds that a request may take, waiting included; then it ends with 504."
    )
    cors_origins: Annotated[list[str], Flag("cors-origin")] = Field(
        [], description="Web origin whose pages may ask, such as https://example.org; repeat for several."
    )
    tls_cert: Path | None = Field(None, description="Certificate, with its chain, to serve HTTPS with.")
    tls_key: Path | None = Field(None, description="Private key of the certificate.")
    responses: Path | None = Field(
        None, description="File that keeps responses; left out: responses.sqlite in the data folder."
    )
    drain: float = Field(60.0, ge=0, description="Seconds that running requests get to end in after SIGTERM.")

    def spec(self) -> ModelSpec:
        """The main model, without the adapters that are served beside it."""
        return super(ServeOptions, self._without_named()).spec()

    def _without_named(self) -> ServeOptions:
        return self.model_copy(update={"adapters": [each for each in self.adapters if _named(each) is None]})

    @property
    def named_adapters(self) -> dict[str, AdapterSpec]:
        """The adapters that are served beside the main model, by the ids that they get. Raises UsageError."""
        found: dict[str, AdapterSpec] = {}
        for match in filter(None, map(_named, self.adapters)):
            if match["name"] in found:
                raise UsageError(f"Two adapters are called '{match['name']}'.", "Give each a name of its own.")
            found[match["name"]] = AdapterSpec.model_validate(match["adapter"])
        return found


def _named(adapter: str) -> re.Match[str] | None:
    """NAME=PATH, unless there is a file of just that name."""
    return None if Path(adapter.rpartition("@")[0] or adapter).exists() else _NAMED.fullmatch(adapter)


class KeySettings(BaseModel):
    """A key: what its holder may do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the key: printf %s KEY | sha256sum")
    models: tuple[str, ...] | None = Field(None, description="Models it may use; left out: all.")
    scopes: tuple[Literal["inference", "metrics", "admin"], ...] = Field(
        ("inference", "metrics"), description="What it is for; admin loads and unloads adapters."
    )
    requests_per_minute: int | None = Field(None, ge=1, description="Requests in a minute; left out: any number.")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Tokens of prompts and answers in a minute; left out: any number."
    )
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
    _check_tls(options)
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


def _check_tls(options: ServeOptions) -> None:
    if (options.tls_cert is None) != (options.tls_key is None):
        raise UsageError("HTTPS needs a certificate and its key.", "Give both --tls-cert and --tls-key.")
    if options.tls_cert is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_cert, options.tls_key, password="")
    except (OSError, ssl.SSLError, TypeError, ValueError) as error:
        raise UsageError(
            f"The certificate {options.tls_cert} and the key {options.tls_key} cannot be used: {error}.",
            "Both are PEM files; the key has no passphrase and belongs to the certificate.",
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
