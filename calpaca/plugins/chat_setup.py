"""What a conversation is held with: model, adapters, engine, sampling, system text and context policy.

A chat is begun with one, changes it while it goes on, and keeps it with its session. `[presets.NAME]` of the settings
holds some of its values under a name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from calpaca.core.errors import UsageError, unknown_name
from calpaca.core.settings import Settings, user_file
from calpaca.plugins.options import ModelOptions, SamplingOptions

_NOTHING = {"", "none", "default"}
"""What is written for an option that is to have its default again."""


class ChatSetup(ModelOptions, SamplingOptions):
    """Left out, a value comes from the settings."""

    system: str | None = Field(None, description="System text that a new session begins with.")
    context: Literal["error", "drop", "summarise"] = Field(
        "drop", description="What happens to old turns that the context has no room for."
    )

    def given(self) -> dict[str, Any]:
        """What differs from the defaults, as a session and a preset keep it."""
        return self.model_dump(mode="json", exclude_defaults=True, include=set(ChatSetup.model_fields))

    def changed(self, values: Mapping[str, Any]) -> ChatSetup:
        """The same with other values. Raises UsageError for an unknown name, or a value that it cannot have."""
        for name in values:
            if name not in ChatSetup.model_fields:
                raise UsageError(*unknown_name("option", name, ChatSetup.model_fields))
        try:
            return ChatSetup(**{**self.given(), **values})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            about = ChatSetup.model_fields[name].description or ""
            raise UsageError(f"{name} is {first['input']!r}: {first['msg']}.", about) from error

    def with_text(self, name: str, text: str) -> ChatSetup:
        """The same with an option as a person writes it: `temperature` `0.7`, `stop` `END`, `seed` `none`."""
        field = name.replace("-", "_")
        if field in ChatSetup.model_fields and text.strip().casefold() in _NOTHING:
            return self.changed({field: ChatSetup.model_fields[field].get_default(call_default_factory=True)})
        return self.changed({field: [text] if field in {"stop", "adapters"} else text})


def preset(name: str, settings: Settings) -> Mapping[str, Any]:
    """The values of `[presets.NAME]`. Raises UsageError for an unknown name."""
    if name not in settings.presets:
        hint = (
            "Save one with: /preset save NAME"
            if not settings.presets
            else unknown_name("preset", name, settings.presets)[1]
        )
        raise UsageError(f"There is no preset '{name}'.", hint)
    return settings.presets[name]


def save_preset(name: str, setup: ChatSetup, settings: Settings) -> None:
    """Write a preset to the end of the user's settings file, and know it from now on.

    Raises UsageError for a name that is taken, and where the file cannot be written.
    """
    if name in settings.presets:
        raise UsageError(f"There is a preset '{name}' already.", f"Choose another name, or change it in {user_file()}.")
    values = {key: value for key, value in setup.given().items() if value is not None}
    # JSON's strings, numbers, lists and truth values are TOML's; a table at the end of a file changes nothing before it.
    lines = [f"[presets.{json.dumps(name)}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    file = user_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            stream.write("\n" + "\n".join(lines) + "\n")
    except OSError as error:
        raise UsageError(
            f"{file} cannot be written: {error.strerror}.", "CALPACA_CONFIG names another folder."
        ) from error
    settings.presets[name] = values
