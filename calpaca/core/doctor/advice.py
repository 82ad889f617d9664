"""What to type next: what is missing, what is short, and what would make calpaca faster here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from calpaca.core.doctor.engine_state import EngineState
from calpaca.core.doctor.surroundings import Folder
from calpaca.core.machine import Machine

_GB = 10**9
_LITTLE_MEMORY, _LITTLE_DISK = 2 * _GB, 5 * _GB


def give_advice(machine: Machine | None, engines: Sequence[EngineState], folders: Sequence[Folder]) -> list[str]:
    """What to type next, the most important first."""
    advice = [*_engine_advice(machine, engines), *_room_advice(machine, folders)]
    if machine is not None:
        advice += _thread_advice(machine, os.environ)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        advice.append("HF_HUB_OFFLINE switches the hubs off: unset it to fetch models.")
    return advice


def _engine_advice(machine: Machine | None, engines: Sequence[EngineState]) -> list[str]:
    from calpaca.core.engine_choice import anything_measured

    states = {each.name: each for each in engines}
    ready = [each.name for each in engines if each.state == "ready"]
    advice = []
    transformers = states.get("transformers")
    if not ready and transformers is not None and transformers.install:
        advice.append(f"No engine can run a model here: {transformers.install}")
    if machine is not None and machine.gpus and transformers is not None and "cuda" in transformers.details:
        if transformers.details["cuda"] == "torch was built without it":
            advice.append(f"torch cannot use the {machine.gpus[0].name}: install its CUDA build (see pytorch.org).")
        elif transformers.details["cuda"] == "no device":
            advice.append(f"torch sees no {machine.gpus[0].name}: its driver may be too old for this build.")
    if machine is not None and not machine.gpus:
        advice += _faster(machine, states)
    if len(ready) > 1 and not anything_measured():
        advice.append("To let --engine auto take the fastest engine: calpaca bench engines")
    return advice


def _faster(machine: Machine, states: Mapping[str, EngineState]) -> list[str]:
    """Engines that are fast on this processor and not installed."""
    sets = machine.processor.instruction_sets
    fast = []
    if machine.processor.architecture.lower() in {"x86_64", "amd64"} and "AVX2" in sets:
        fast.append("openvino")
    if "AVX2" in sets or "NEON" in sets:
        fast.append("llama_cpp")
    missing = [states[name] for name in fast if name in states and states[name].state == "not installed"]
    return [f"For more speed on this processor, the engine '{each.name}': {each.install}" for each in missing]


def _room_advice(machine: Machine | None, folders: Sequence[Folder]) -> list[str]:
    advice = []
    room = machine.memory.room if machine is not None else None
    if room is not None and room < _LITTLE_MEMORY:
        advice.append(
            f"Only {room / _GB:.1f} GB of memory are free: close other programs, or take a small or quantized model."
        )
    for folder in folders:
        if folder.free is not None and folder.free < _LITTLE_DISK and folder.name != "data":
            advice.append(f"Only {folder.free / _GB:.1f} GB are free where the {folder.name} lies ({folder.path}).")
        if not folder.writable:
            moved = {"cache": "CALPACA_CACHE", "data": "CALPACA_DATA"}.get(folder.name, "HF_HOME")
            advice.append(f"{folder.path} cannot be written: set {moved} to another folder.")
    return advice


def _thread_advice(machine: Machine, variables: Mapping[str, str]) -> list[str]:
    """A decode that shares its cores with others collapses: its threads wait for each other at every layer."""
    processor = machine.processor
    usable = max(int(processor.usable_cores), 1)
    given = variables.get("OMP_NUM_THREADS", "")
    if given.isdecimal():
        if int(given) > usable:
            return [f"OMP_NUM_THREADS is {given}, but {usable} cores can be used: set it to {usable}."]
        return []
    if processor.load is not None and processor.load > 0.75 * usable and usable > 1:
        return [
            f"Other programs are busy (load {processor.load:.1f} on {usable} cores): set OMP_NUM_THREADS="
            f"{max(usable - round(processor.load), 1)}, or a model slows down far more than they take."
        ]
    if processor.logical_cores is not None and usable < processor.logical_cores and processor.usable_cores % 1:
        return [f"A container grants {processor.usable_cores:g} cores: set OMP_NUM_THREADS={usable}."]
    physical = processor.physical_cores
    if physical is not None and physical < usable:
        return [f"Two threads share each of the {physical} cores: set OMP_NUM_THREADS={physical}."]
    return []
