"""A model under a name in the settings: `[models.NAME]` at the end of `calpaca.toml`."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from calpaca.core.errors import UsageError
from calpaca.core.paths import atomic_file
from calpaca.core.settings import PROJECT_FILE, user_file
from calpaca.core.spec import ModelSpec

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def settings_file() -> Path:
    """The project's file where there is one, else the user's."""
    return PROJECT_FILE.absolute() if PROJECT_FILE.is_file() else user_file()


def check_name(name: str, file: Path) -> None:
    """Raises UsageError for a name that cannot be given, or that the file has already."""
    if not _BARE.fullmatch(name):
        raise UsageError(f"--name is {name!r}.", "Use letters, digits, - and _.")
    if name in _read(file).get("models", {}):
        raise UsageError(f"{file} names a model '{name}' already.", "Choose another --name, or remove that section.")


def register(name: str, spec: ModelSpec, file: Path) -> None:
    """Append a section; what is in the file stays as it is, comments too. Raises UsageError as `check_name` does."""
    check_name(name, file)
    before = file.read_text("utf-8") if file.is_file() else ""
    gap = "" if not before or before.endswith("\n\n") else "\n" if before.endswith("\n") else "\n\n"
    text = before + gap + section(name, spec)
    if tomllib.loads(text).get("models", {}).get(name) is None:
        raise UsageError(f"{file} takes no section [models.{name}].", "Write its models as sections.")
    with atomic_file(file) as part:
        part.write_text(text, "utf-8")


def section(name: str, spec: ModelSpec) -> str:
    """`[models.NAME]` with what differs from the defaults; paths are absolute. JSON's texts and lists are TOML's."""
    values: dict[str, Any] = spec.model_dump(mode="json", exclude_defaults=True, exclude={"adapters", "api_key"})
    adapters = [_absolute(str(each)) for each in spec.adapters]
    lines = {**{key: _absolute(value) for key, value in values.items()}, **({"adapters": adapters} if adapters else {})}
    body = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in lines.items())
    return f"[models.{name}]\n{body}"


def _absolute(value: Any) -> Any:
    """A path that is there, so that it is found from other folders too; everything else as it is."""
    if not isinstance(value, str):
        return value
    source, at, scale = value.rpartition("@")
    path, rest = (source, f"@{scale}") if at and Path(source).exists() else (value, "")
    return f"{Path(path).absolute()}{rest}" if path and Path(path).exists() else value


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}.", "Correct it first.") from error
