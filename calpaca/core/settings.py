"""Settings: one typed tree, read once and passed down.

A value is taken from, in order: the typed option, the environment (`CALPACA_MODEL`, nested names with two underscores:
`CALPACA_SAMPLING__TEMPERATURE`), `calpaca.toml` in the current folder, `config.toml` in the user's configuration
folder, the default here. A variable `CALPACA_…` that nothing reads is named in one line.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from calpaca.core.errors import UsageError, nearest
from calpaca.core.paths import config_dir
from calpaca.core.spec import ModelSpec

log = logging.getLogger("calpaca")

PROJECT_FILE = Path("calpaca.toml")
PREFIX = "CALPACA_"

VARIABLES = {
    "CALPACA_PLUGINS": "Names of the plugins to load, separated by commas; empty for none but the built-in one.",
    "CALPACA_STRICT_PLUGINS": "1 ends with an error when a plugin is broken instead of going on without it.",
    "CALPACA_CACHE": "Folder for downloads, converted models and indexes.",
    "CALPACA_DATA": "Folder for the job ledger.",
    "CALPACA_CONFIG": "Folder of the user's `config.toml`.",
    "CALPACA_API_KEY": "Key for the servers that the engine `remote` asks.",
    "CALPACA_DEBUG": "`1` shows tracebacks and other libraries' warnings.",
}
"""Variables that are no settings, and what each is for."""


class SamplingSettings(BaseModel):
    """Defaults for every generation; an option or argument overrides them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int | None = Field(None, description="Longest answer in tokens; empty: 512 or what is left.")
    temperature: float = Field(0.0, description="0 always takes the likeliest token.")
    top_p: float = Field(1.0, description="Keep the likeliest tokens that together reach this probability.")
    top_k: int = Field(0, description="Keep this many of the likeliest tokens; 0 keeps all.")
    repetition_penalty: float = Field(1.0, description="Above 1 makes tokens that occurred already less likely.")
    seed: int | None = Field(None, description="Makes sampling repeatable.")
    stop: tuple[str, ...] = Field((), description="Texts that end an answer.")


class RemoteSettings(BaseModel):
    """Servers that the engine `remote` asks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoints: tuple[str, ...] = Field(
        (), description="Addresses of servers that offer the same models, such as http://gpu1:8000/v1."
    )
    server: Literal["auto", "openai", "vllm", "llama_cpp", "ollama", "calpaca"] = Field(
        "auto", description="What the servers run, and so which fields they know; auto asks them."
    )
    api_key_file: Path | None = Field(
        None, description="File with the key that the servers want; CALPACA_API_KEY goes before it."
    )
    connect_timeout: float = Field(5.0, gt=0, description="Seconds to wait for a connection.")
    timeout: float = Field(300.0, gt=0, description="Seconds without a sign of life before a request fails.")
    retries: int = Field(4, ge=0, description="How often a request that has no answer yet is tried again.")


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    model: str | None = Field(None, description="Model used when none is named; empty: the catalogue's default.")
    embedding: str | None = Field(None, description="Embedding model used when none is named.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 or cuda:0,1.")
    engine: str = Field("auto", description="Engine used when none is named.")
    hub_timeout: float = Field(3.0, description="Seconds to wait for a model hub before the next source is tried.")
    attach: bool = Field(
        True, description="Let `calpaca run` use a running `calpaca serve` that has the wanted model loaded."
    )
    sampling: SamplingSettings = Field(SamplingSettings(), description="Defaults for every generation.")
    remote: RemoteSettings = Field(RemoteSettings(), description="Servers that the engine `remote` asks.")
    models: dict[str, ModelSpec] = Field({}, description="Named models: [models.NAME] model = …, adapters = […].")
    apps: dict[str, dict[str, Any]] = Field({}, description="Configured apps: [apps.NAME] app = …, and its options.")
    presets: dict[str, dict[str, Any]] = Field(
        {}, description="Set-ups of the chat: [presets.NAME] model = …, temperature = … (/preset)."
    )
    plugins: dict[str, dict[str, Any]] = Field({}, description="A plugin's own settings, checked by the plugin.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Typed option, environment, project file, user file."""
        files = [TomlConfigSettingsSource(settings_cls, file) for file in (PROJECT_FILE, user_file())]
        return (init_settings, _SettingsEnvironment(settings_cls), *files)


_SECTIONS: dict[str, type[BaseModel]] = {"sampling": SamplingSettings, "remote": RemoteSettings}
_TABLES = frozenset({"models", "apps", "presets", "plugins"})


class _SettingsEnvironment(EnvSettingsSource):
    """`CALPACA_PLUGINS`, `CALPACA_MODELS` and `CALPACA_APPS` are no settings: the first limits which plugins load."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        if field_name in _TABLES:
            return None, field_name, False
        return super().get_field_value(field, field_name)


def user_file() -> Path:
    return config_dir() / "config.toml"


def read_settings(**options: Any) -> Settings:
    """Read the tree; `options` are typed options and override every file.

    Raises UsageError that names the file or setting, and the nearest known name for an unknown one.
    """
    for variable in sorted(map(str.upper, os.environ)):
        if variable.startswith(PREFIX):
            _check_variable(variable)
    try:
        return Settings(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            match = nearest(str(first["loc"][-1]), _known_names(first["loc"]))
            suggestion = f"Did you mean '{match}'? " if match else ""
            raise UsageError(f"Unknown setting '{name}'.", f"{suggestion}`calpaca settings` lists them.") from error
        raise UsageError(
            f"Setting '{name}' is {first['input']!r}: {first['msg']}.", "See `calpaca settings`."
        ) from error
    except SettingsError as error:
        raise UsageError(
            f"The environment holds a wrong setting: {error}.", "It must be JSON for a whole section."
        ) from error
    except ValueError as error:
        raise UsageError(
            f"A settings file is not valid TOML: {error}.", f"Check {PROJECT_FILE} and {user_file()}."
        ) from error


@cache  # said once, however often the settings are read
def _check_variable(variable: str) -> None:
    """One line about a variable that nothing reads; wrong names within a section are refused with the settings."""
    section, nested, _ = variable.removeprefix(PREFIX).lower().partition("__")
    known = {*VARIABLES, *(PREFIX + name.upper() for name in Settings.model_fields.keys() - _TABLES)}
    if variable in known or (nested and section in {*_SECTIONS, *_TABLES}):
        return
    known |= {
        f"{PREFIX}{section}__{name}".upper() for section, model in _SECTIONS.items() for name in model.model_fields
    }
    match = nearest(variable.removeprefix(PREFIX), [name.removeprefix(PREFIX) for name in known])
    suggestion = f"Did you mean {PREFIX}{match}?" if match else "`calpaca settings` lists the known ones."
    log.warning("Nothing reads the environment variable %s. %s", variable, suggestion)


def _known_names(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that holds the last part of `location`."""
    sections: dict[str, type[BaseModel]] = {"models": ModelSpec, **_SECTIONS}
    owner = sections.get(str(location[0]), Settings)
    return list(owner.model_fields)
