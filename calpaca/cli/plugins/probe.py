"""Plugins tried out, each in a process of its own: one that hangs, crashes or leaves there does so alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calpaca.core.errors import CalpacaError, MissingExtraError, PluginError
from calpaca.core.registry import Component, Registry
from calpaca.plugins.app import App
from calpaca.plugins.commands import plugin_commands
from calpaca.plugins.discovery import (
    BUILTIN,
    Candidate,
    PluginRecord,
    allowed_plugins,
    installed_plugins,
    load_plugins,
    refuse_second,
)

_AT_ONCE = 2


def probe_plugins(timeout: float) -> list[PluginRecord]:
    """A record of every installed plugin after importing all that it offers, given `timeout` seconds each.

    Names that two plugins offer are a fault of the second, as they are when the program loads them.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        records = list(pool.map(partial(probe_plugin, timeout=timeout), installed_plugins()))
    registries: dict[str, Registry[Component]] = {}
    for at, record in enumerate(records):
        try:
            if record.state == "ok":
                refuse_second(record, records[:at])
                _claim_names(record, registries)
        except PluginError as error:
            record.fail(error)
    return records


def _claim_names(record: PluginRecord, registries: dict[str, Registry[Component]]) -> None:
    for hook, components in record.offers.items():
        kind = hook.removeprefix("register_").removesuffix("s")
        for component in components:
            registries.setdefault(hook, Registry(kind)).add(component, str(record))


def probe_plugin(candidate: Candidate, timeout: float) -> PluginRecord:
    """A record of one plugin by itself, whose process is ended after `timeout` seconds."""
    record, allowed = PluginRecord(candidate.name, candidate.distribution, candidate.version), allowed_plugins()
    if allowed is not None and candidate.name not in allowed | {BUILTIN}:
        record.state = "blocked"
        return record
    with TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        arguments = [candidate.name, candidate.distribution, str(result)]
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import report; report(*{arguments!r})"
        command = [sys.executable, "-c", code]
        try:
            with log.open("wb") as noise:
                ended = subprocess.run(  # noqa: S603  # our own interpreter
                    command, stdin=subprocess.DEVNULL, stdout=noise, stderr=noise, timeout=timeout, check=False
                ).returncode
        except subprocess.TimeoutExpired:
            error = f"It was not imported within {timeout:g} seconds."
            record.fail(PluginError(error, f"Until it is mended, {_instead(record)}."))
            return record
        if not result.exists():
            record.fail(PluginError(_end_of(ended, log), f"Until it is mended, {_instead(record)}."))
            return record
        _read(record, json.loads(result.read_text(encoding="utf-8")))
    return record


def _instead(record: PluginRecord) -> str:
    return f"uninstall {record.distribution}, or name the plugins to load in CALPACA_PLUGINS"


def _end_of(code: int, log: Path) -> str:
    """How a process ended that gave no result, and the last line that it wrote."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"While it was imported the process {how}." + (f" Its last words: {lines[-1]}" if lines else "")


def _read(record: PluginRecord, found: dict[str, Any]) -> None:
    for name in ("state", "error", "hint", "load_time", "hooks"):
        setattr(record, name, found[name])
    record.offers = {
        hook: [Component(name, "", "") for name in components] for hook, components in found["offers"].items()
    }


# In the child ------------------------------------------------------------------------------------------------------------


def report(name: str, distribution: str, file: str) -> None:
    """Load one plugin and write what came of it to `file`."""
    wanted = (name, distribution)
    candidate = next(each for each in installed_plugins() if (each.name, each.distribution) == wanted)
    (record,) = load_plugins([candidate]).records
    if record.state == "ok" and (faults := [*_faults(record), *_faulty_commands(distribution)]):
        record.fail(PluginError(" ".join(faults), "Report this to the plugin's author."))
    offers = {hook: [component.name for component in components] for hook, components in record.offers.items()}
    kept = {name: getattr(record, name) for name in ("state", "error", "hint", "load_time", "hooks")}
    Path(file).write_text(json.dumps({**kept, "offers": offers}), encoding="utf-8")


def _faults(record: PluginRecord) -> Iterator[str]:
    """What keeps parts of a plugin from being used; a missing extra is no fault of the plugin."""
    for components in record.offers.values():
        for component in components:
            try:
                _use(component)
            except MissingExtraError:
                continue
            except CalpacaError as error:
                yield f"{type(component).__name__} '{component.name}': {error}"
            except (Exception, SystemExit) as error:  # whatever a plugin's module raises while it is imported
                yield f"{type(component).__name__} '{component.name}': {type(error).__name__}: {error}"


def _use(component: Component) -> None:
    from calpaca.cli.flags import flags

    if isinstance(component, App):
        flags(component.name, component.load_options())
    component.load()


def _faulty_commands(distribution: str) -> Iterator[str]:
    from calpaca.cli.main import COMMANDS

    for command in plugin_commands(COMMANDS).values():
        if command.distribution == distribution:
            try:
                command.load()
            except (Exception, SystemExit) as error:
                yield str(error)
