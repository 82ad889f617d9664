"""The machine that calpaca runs on: processor, memory and GPUs, as the operating system tells them.

Linux is read from `/proc` and `/sys`, macOS asked with `sysctl`; elsewhere psutil is used where it is installed. What
cannot be found out is None.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

_SECONDS = 5.0

INSTRUCTION_SETS: Mapping[str, str] = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX-512 BF16", "avx512_fp16": "AVX-512 FP16", "amx_tile": "AMX", "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8", "asimd": "NEON", "asimddp": "NEON dot product", "i8mm": "I8MM", "bf16": "BF16",
    "sve": "SVE", "sve2": "SVE2", "sme": "SME",
}  # fmt: skip
"""Flags of the processor that engines make use of, and how people call them."""

_APPLE_FEATURES = {
    "AdvSIMD": "asimd",
    "FEAT_DotProd": "asimddp",
    "FEAT_I8MM": "i8mm",
    "FEAT_BF16": "bf16",
    "FEAT_SME": "sme",
}


@dataclass(frozen=True)
class Processor:
    """Cores as they are built in, and `usable`: how many this process may use, with a fraction in a container."""

    name: str
    architecture: str
    physical_cores: int | None
    logical_cores: int | None
    usable_cores: float
    instruction_sets: tuple[str, ...] = ()
    load: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes; `limit` is what a container may use."""

    total: int | None = None
    available: int | None = None
    swap_total: int | None = None
    swap_free: int | None = None
    limit: int | None = None

    @property
    def room(self) -> int | None:
        """Bytes that a model could take now."""
        known = [each for each in (self.available, self.limit) if each is not None]
        return min(known, default=None)


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver sees it; memory in bytes."""

    name: str
    memory_total: int | None = None
    memory_free: int | None = None
    driver: str | None = None
    compute_capability: str | None = None


@dataclass(frozen=True)
class Machine:
    """All of it."""

    system: str
    processor: Processor
    memory: Memory
    gpus: tuple[Gpu, ...] = field(default_factory=tuple)


def describe_machine() -> Machine:
    """Ask the operating system. Takes well under a second, a few with a GPU whose driver sleeps."""
    return Machine(f"{platform.system()} {platform.release()}", describe_processor(), describe_memory(), find_gpus())


# Processor -----------------------------------------------------------------------------------------------------------


def describe_processor() -> Processor:
    return Processor(
        name=processor_name(),
        architecture=platform.machine(),
        physical_cores=_physical_cores(),
        logical_cores=os.cpu_count(),
        usable_cores=usable_cores(),
        instruction_sets=tuple(name for flag, name in INSTRUCTION_SETS.items() if flag in _flags()),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def processor_name() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def usable_cores() -> float:
    """Cores that this process may use: its affinity, and what a container's quota leaves of it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(float(cores), _quota() or float(cores))


def computing_threads() -> int:
    """Threads that each have a core to compute on: the physical cores of this process's affinity, within its quota."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    cores = {_read(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").strip() for core in allowed}
    cores.discard("")
    usable = int(usable_cores())
    return max(min(len(cores) or _physical_cores() or usable, usable), 1)


def _quota() -> float | None:
    """Cores that the control group grants (version 2, then version 1)."""
    words = _read("/sys/fs/cgroup/cpu.max").split()
    if len(words) != 2:
        words = [_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        quota, period = map(int, words)
    except ValueError:  # "max": no limit
        return None
    return quota / period if quota > 0 and period > 0 else None


def _physical_cores() -> int | None:
    if sys.platform == "darwin":
        return _number(_sysctl("hw.physicalcpu"))
    siblings = {
        _read(path).strip() for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    }
    siblings.discard("")
    return len(siblings) or _psutil(lambda psutil: psutil.cpu_count(logical=False))


def _flags() -> frozenset[str]:
    if sys.platform == "darwin":
        intel = _sysctl("machdep.cpu.leaf7_features").lower().split()
        arm = {flag for name, flag in _APPLE_FEATURES.items() if _sysctl(f"hw.optional.arm.{name}") == "1"}
        return frozenset(intel) | frozenset(arm)
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


# Memory --------------------------------------------------------------------------------------------------------------


def describe_memory() -> Memory:
    sizes = {
        name: int(size) * 1024
        for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    }
    if sizes:
        return Memory(
            sizes.get("MemTotal"), sizes.get("MemAvailable"), sizes.get("SwapTotal"), sizes.get("SwapFree"), _memory_limit()
        )  # fmt: skip
    total = _number(_sysctl("hw.memsize")) if sys.platform == "darwin" else None
    return Memory(
        total or _psutil(lambda psutil: psutil.virtual_memory().total),
        _psutil(lambda psutil: psutil.virtual_memory().available),
        _psutil(lambda psutil: psutil.swap_memory().total),
        _psutil(lambda psutil: psutil.swap_memory().free),
    )


def _memory_limit() -> int | None:
    """What the control group still grants (version 2, then version 1); None without a limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most = _number(_read(limit))
        if most is not None and most < 1 << 60:
            return max(most - (_number(_read(used)) or 0), 0)
    return None


# GPUs ----------------------------------------------------------------------------------------------------------------


def find_gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs by `nvidia-smi`; others are found by the engines that use them."""
    program = which("nvidia-smi")
    if program is None:
        return ()
    fields = "name,memory.total,memory.free,driver_version,compute_cap"
    table = _run(program, f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return tuple(
        _gpu([cell.strip() for cell in line.split(",")]) for line in table.splitlines() if line.count(",") == 4
    )


def _gpu(cells: list[str]) -> Gpu:
    name, total, free, driver, capability = cells
    megabytes = [_number(size) for size in (total, free)]
    sizes = [size << 20 if size is not None else None for size in megabytes]
    return Gpu(name, sizes[0], sizes[1], driver, capability)


# Asking --------------------------------------------------------------------------------------------------------------


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    return _run("/usr/sbin/sysctl", "-n", name).strip()


def _run(*command: str) -> str:
    """What a program prints; empty when it fails or takes too long."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return result.stdout if result.returncode == 0 else ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None


def _psutil(ask: Callable[[Any], int | None]) -> int | None:
    if find_spec("psutil") is None:
        return None
    try:
        return ask(import_module("psutil"))
    except (ImportError, OSError, NotImplementedError, RuntimeError):
        return None
