"""Whether an engine can be used here. Each is imported in a process of its own, where a native crash harms nobody."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from typing import Literal

from calpaca.core.doctor.surroundings import without_password
from calpaca.core.engine import EngineComponent
from calpaca.core.registry import Component
from calpaca.core.settings import Settings

PROBE_SECONDS = 30.0


@dataclass(frozen=True)
class EngineState:
    """One engine. `install` is the line that installs what it lacks; `error` says why it cannot be imported."""

    name: str
    summary: str
    state: Literal["ready", "not installed", "broken", "asks servers"]
    versions: Mapping[str, str] = field(default_factory=dict)
    install: str | None = None
    error: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)


_PROBE = """
import importlib, json, sys
*names, target = sys.argv[1:]
for name in names:
    importlib.import_module(name)
importlib.import_module(target)
found = {}
torch = sys.modules.get("torch")
if torch is not None:
    found["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        found["cuda"] = f"{torch.version.cuda}: " + ", ".join(
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        )
    elif torch.version.cuda is None and torch.version.hip is None:
        found["cuda"] = "torch was built without it"
    else:
        found["cuda"] = "no device"
sys.stdout.write("\\n" + json.dumps(found))
"""


def describe_engine(engine: Component, settings: Settings, patience: float) -> EngineState:
    if isinstance(engine, EngineComponent) and not engine.local:
        endpoints = ", ".join(map(without_password, settings.remote.endpoints)) or "none set"
        return EngineState(engine.name, engine.summary, "asks servers", details={"endpoints": endpoints})
    missing = [name for name in engine.packages if not _is_there(name)]
    if missing:
        install = f"pip install 'calpaca[{engine.extra}]'" if engine.extra else f"pip install {' '.join(missing)}"
        return EngineState(engine.name, engine.summary, "not installed", install=install)
    versions = installed_versions(engine.packages)
    details, error = probe(engine, patience)
    return EngineState(
        engine.name, engine.summary, "broken" if error else "ready", versions, error=error, details=details
    )  # fmt: skip


def _is_there(package: str) -> bool:
    try:
        return find_spec(package.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def probe(engine: Component, patience: float = PROBE_SECONDS) -> tuple[dict[str, str], str | None]:
    """Import an engine in a process of its own: what it says about itself, and why it cannot be imported."""
    command = [sys.executable, "-c", _PROBE, *engine.packages, engine.target.partition(":")[0]]
    try:
        result = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, errors="replace", timeout=patience, check=False, stdin=subprocess.DEVNULL
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {}, f"importing it takes more than {patience:g} s"
    if result.returncode < 0:
        return {}, f"importing it crashes (signal {-result.returncode})"
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return {}, last[:300]
    try:
        return json.loads(result.stdout.strip().splitlines()[-1]), None
    except (ValueError, IndexError):
        return {}, None


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the distributions of these names that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
