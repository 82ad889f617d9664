"""What calpaca finds on this machine, what is broken, and what would make it faster.

Every part is found out on its own, so that one that fails is a line of the report and nothing more.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from calpaca import __version__
from calpaca.core.doctor.advice import give_advice
from calpaca.core.doctor.engine_state import PROBE_SECONDS, EngineState, describe_engine, installed_versions
from calpaca.core.doctor.surroundings import (
    Folder,
    Reachable,
    ask_hubs,
    describe_folders,
    shown_environment,
    without_password,
)
from calpaca.core.errors import CalpacaError
from calpaca.core.machine import Machine, describe_machine
from calpaca.core.registry import Component
from calpaca.core.settings import PROJECT_FILE, Settings, read_settings, user_file

T = TypeVar("T")

LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "safetensors", "sentencepiece", "llguidance", "sentence-transformers",
    "faiss-cpu", "langchain-core", "huggingface-hub", "httpx", "numpy", "pydantic",
)  # fmt: skip
"""Distributions whose versions matter when something goes wrong."""


@dataclass(frozen=True)
class Report:
    """Everything that was found. `problems` are what could not be found out or is broken, `advice` what to do."""

    calpaca: str
    python: str
    machine: Machine | None
    engines: tuple[EngineState, ...]
    libraries: Mapping[str, str]
    folders: tuple[Folder, ...]
    settings_files: Mapping[str, bool]
    environment: Mapping[str, str]
    hubs: tuple[Reachable, ...]
    problems: tuple[str, ...]
    advice: tuple[str, ...]


def examine(
    engines: Iterable[Component],
    *,
    online: bool = False,
    patience: float = PROBE_SECONDS,
    problems: Iterable[str] = (),
) -> Report:
    """Look at everything. Asks a network only when `online` is set; raises nothing.

    Each engine gets `patience` seconds to be imported; `problems` are known ones.
    """
    problems = list(problems)
    settings = _settings(problems)
    machine = _part("the machine", describe_machine, None, problems)
    with ThreadPoolExecutor(8) as threads:
        states = list(threads.map(lambda each: describe_engine(each, settings, patience), engines))
    problems += [f"The engine '{each.name}' cannot be used: {each.error}" for each in states if each.state == "broken"]
    no_folders: tuple[Folder, ...] = ()
    no_hubs: tuple[Reachable, ...] = ()
    nothing: list[str] = []
    folders = _part("the folders", describe_folders, no_folders, problems)
    hubs = _part("the hubs", lambda: ask_hubs(settings), no_hubs, problems) if online else no_hubs
    problems += [f"{each.name} ({each.address}) {each.error}." for each in hubs if each.error is not None]
    advice = _part("what would help", lambda: give_advice(machine, states, folders), nothing, problems)
    return Report(
        calpaca=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        machine=machine,
        engines=tuple(states),
        libraries=_part("the libraries", lambda: installed_versions(LIBRARIES), {}, problems),
        folders=folders,
        settings_files={str(file.absolute()): file.is_file() for file in (PROJECT_FILE, user_file())},
        environment=shown_environment(os.environ),
        hubs=hubs,
        problems=tuple(problems),
        advice=tuple(advice),
    )


def _part(name: str, find_out: Callable[[], T], otherwise: T, problems: list[str]) -> T:
    """One part of the report; what goes wrong becomes a problem."""
    try:
        return find_out()
    except Exception as error:  # whatever is broken here must not hide the rest
        problems.append(f"Could not find out about {name}: {type(error).__name__}: {error}")
        return otherwise


def _settings(problems: list[str]) -> Settings:
    try:
        return read_settings()
    except CalpacaError as error:
        problems.append(f"The settings are wrong: {without_password(str(error))}")
        return Settings.model_construct()
