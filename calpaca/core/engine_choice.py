"""Which engine `auto` means: the fastest that was measured on this machine with this model, else a rule.

`calpaca bench engines` measures and records. The choice asks for one stream (somebody chats) or for load (a server).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calpaca.core.errors import UsageError
from calpaca.core.machine import processor_name
from calpaca.core.paths import atomic_file, data_dir

if TYPE_CHECKING:
    from calpaca.core.files import ModelFiles
    from calpaca.core.runtime import Runtime

Purpose = Literal["chat", "load"]
PURPOSES: tuple[Purpose, ...] = ("chat", "load")

DEFAULT = "transformers"
"""Runs every model exactly as it is, so it is the engine where nothing was measured."""

_WITHOUT_TORCH = ("llama_cpp", "openvino")
_WHOLE = {None, "F32", "F16", "BF16"}  # types of weights that no quantization has made coarser
_LOAD = 8  # requests at once from which on it is load


@dataclass(frozen=True)
class Measurement:
    """One engine with one model on one machine.

    `tokens_per_second` maps requests at once to new tokens per second of all of them together, `first_token` is in
    seconds (median, one request at a time), `load` the seconds until the first request could be sent, `memory` the
    peak resident bytes of all its processes. `error` says why an engine could not be measured.
    """

    engine: str
    tokens_per_second: Mapping[int, float] = field(default_factory=dict)
    first_token: float = 0.0
    load: float = 0.0
    memory: int = 0
    details: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def whole(self) -> bool:
        """Whether the weights were run as numbers and not as quantized blocks, which is faster and another model."""
        return self.details.get("weights") in _WHOLE

    def speed(self, purpose: Purpose) -> float:
        """Tokens per second that count for a purpose: of one stream, or the best under load."""
        loaded = [speed for streams, speed in self.tokens_per_second.items() if streams >= _LOAD]
        return self.tokens_per_second.get(1, 0.0) if purpose == "chat" else max(loaded, default=0.0)


def machine() -> str:
    """The processor and how many of its cores this process may use: measurements hold for that."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_name()}, {cores} cores"


def _file() -> Path:
    return data_dir() / "engines.json"


def read_measurements(model: str) -> list[Measurement]:
    """What was measured on this machine with the model of this key. A damaged file counts as empty."""
    try:
        records = json.loads(_file().read_text("utf-8"))[machine()][model]
        return [_measurement(record) for record in records]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def record_measurements(model: str, measurements: Iterable[Measurement]) -> Path:
    """Keep measurements of a model on this machine, in place of earlier ones of the same engines; the file."""
    kept = {each.engine: each for each in (*read_measurements(model), *measurements)}
    try:
        content = json.loads(_file().read_text("utf-8"))
    except (OSError, ValueError):
        content = {}
    content.setdefault(machine(), {})[model] = [asdict(each) for each in kept.values()]
    with atomic_file(_file()) as unfinished:
        unfinished.write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
    return _file()


def _measurement(record: Mapping[str, object]) -> Measurement:
    speeds = record["tokens_per_second"]
    assert isinstance(speeds, dict)
    return Measurement(**{**record, "tokens_per_second": {int(streams): speed for streams, speed in speeds.items()}})  # type: ignore[arg-type]


def model_key(files: ModelFiles) -> str:
    """What measurements of a model are kept under: its contents, and the dtype it is to run in."""
    return f"{files.fingerprint} {files.spec.dtype}"


def choose_engine(files: ModelFiles, runtime: Runtime, purpose: Purpose | None = None) -> str:
    """The engine that `auto` means for a model and a purpose, by default that of the runtime.

    What only the default engine does (CUDA, bitsandbytes, code of a model's own) is left to it.
    """
    spec = files.spec
    if spec.device.startswith("cuda") or spec.quantization is not None or spec.trust_remote_code:
        return DEFAULT
    usable = _comparable(files, runtime) if anything_measured() else []  # hashing takes its time
    if usable:
        return max(usable, key=lambda each: each.speed(purpose or runtime.purpose)).engine
    if find_spec("torch") is None:
        return next((name for name in _WITHOUT_TORCH if is_installed(name, runtime)), DEFAULT)
    return DEFAULT


def _comparable(files: ModelFiles, runtime: Runtime) -> list[Measurement]:
    """Measurements of installed engines that ran a model's weights as they were given.

    An engine that made them coarser is not chosen for the speed that this gave it. One that takes a quantized GGUF file
    as it is rounds only what the weights are multiplied with: llama.cpp on SmolLM2 in Q4_1 named the same next token as
    float32 arithmetic after 192 of 200 beginnings, bfloat16 after 193.
    """
    measured = [each for each in read_measurements(model_key(files)) if each.error is None]
    given = _given_type(files, runtime) if not all(each.whole for each in measured) else None
    return [
        each
        for each in measured
        if is_installed(each.engine, runtime) and (each.whole or each.details.get("weights") == given)
    ]


def _given_type(files: ModelFiles, runtime: Runtime) -> str | None:
    """ggml's name of the type that the weights of a GGUF file have; None for a model of another form."""
    from calpaca.core import gguf
    from calpaca.core.sources import resolve_model

    spec = files.spec
    path = resolve_model(spec.model, runtime, revision=spec.revision).path if spec.model else files.weights
    return gguf.read_header(path).main_type if path.suffix == ".gguf" and path.is_file() else None


def anything_measured() -> bool:
    """Whether it is worth knowing a model's fingerprint before the engine is chosen."""
    try:
        return machine() in json.loads(_file().read_text("utf-8"))
    except (OSError, ValueError):
        return False


def is_installed(engine: str, runtime: Runtime) -> bool:
    """Whether an engine is registered and the packages it is made of are there."""
    return engine in runtime.engines and all(map(find_spec, runtime.engines.get(engine).packages))


def local_engines(runtime: Runtime) -> list[str]:
    """Engines that run models on this machine and are installed."""
    return [each.name for each in runtime.engines if each.packages and is_installed(each.name, runtime)]


def check_engines(names: Iterable[str], runtime: Runtime) -> list[str]:
    """Engines by name. Raises UsageError for one that is unknown or runs nothing here."""
    for name in names:
        if not runtime.engines.get(name).packages:
            raise UsageError(f"Engine '{name}' runs no models on this machine.", "Measure where they run.")
    return list(names)
