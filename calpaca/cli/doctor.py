"""`calpaca doctor`: what calpaca finds on this machine, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from calpaca.cli.table import size, table

if TYPE_CHECKING:
    from calpaca.core.doctor.engine_state import EngineState
    from calpaca.core.doctor.report import Report
    from calpaca.core.doctor.surroundings import Folder
    from calpaca.core.machine import Gpu, Machine

    Rows = Iterator[tuple[str, ...]]


@click.command()
@click.option("--online", is_flag=True, help="Also ask the model hubs and the servers of the settings.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def doctor(online: bool, as_json: bool) -> None:
    """Show what calpaca finds here, what is broken and what would help.

    Engines are imported in processes of their own, so that a broken one is a line here. No network is asked without
    --online, and no key or password is shown.
    """
    from calpaca.core.doctor.report import examine
    from calpaca.plugins.discovery import allowed_plugins, installed_plugins, load_plugins

    plugins = load_plugins(installed_plugins(), allowed_plugins())
    engines = [engine for record in plugins.records for engine in record.offers.get("register_engines", ())]
    broken = [f"Plugin {record} is {record.state}: {record.error} {record.hint}" for record in plugins.failed()]
    report = examine(engines, online=online, problems=broken)
    if as_json:
        click.echo(json.dumps(asdict(report), ensure_ascii=False, indent=2))
        return
    click.echo(f"calpaca {report.calpaca}, Python {report.python}")
    for heading, rows in _sections(report).items():
        lines = [*rows]
        if lines:
            click.echo(f"\n{heading}\n" + _indented(table(lines[0], lines[1:]) if len(lines[0]) > 1 else _list(lines)))


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _list(lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"- {' '.join(line)}" for line in lines)


def _sections(report: Report) -> dict[str, Rows]:
    """Heading: rows of one width."""
    return {
        "Machine": _machine(report.machine) if report.machine is not None else iter(()),
        "Engines": map(_engine, report.engines),
        "Libraries": iter(report.libraries.items()),
        "Folders": map(_folder, report.folders),
        "Settings": ((file, "read" if there else "not there") for file, there in report.settings_files.items()),
        "Environment": iter(report.environment.items()),
        "Hubs": ((each.name, each.address, each.error or "answers") for each in report.hubs),
        "Problems": ((problem,) for problem in report.problems),
        "Advice": ((line,) for line in report.advice),
    }


def _machine(machine: Machine) -> Rows:
    processor, memory = machine.processor, machine.memory
    yield "system", f"{machine.system}, {processor.architecture}"
    yield "processor", processor.name
    yield (
        "cores",
        (
            f"{processor.physical_cores or '?'} physical, {processor.logical_cores or '?'} logical, "
            f"{processor.usable_cores:g} usable"
        ),
    )
    if processor.load is not None:
        yield "load", f"{processor.load:.1f}"
    yield "instructions", ", ".join(processor.instruction_sets) or "none that engines make use of"
    yield (
        "memory",
        f"{_bytes(memory.available)} free of {_bytes(memory.total)}"
        + (f", {_bytes(memory.limit)} left in this container" if memory.limit is not None else ""),
    )
    yield "swap", f"{_bytes(memory.swap_free)} free of {_bytes(memory.swap_total)}" if memory.swap_total else "none"
    for gpu in machine.gpus or (None,):
        yield "GPU", _gpu(gpu) if gpu is not None else "none that nvidia-smi knows"


def _gpu(gpu: Gpu) -> str:
    return f"{gpu.name}, {_bytes(gpu.memory_free)} free of {_bytes(gpu.memory_total)}, driver {gpu.driver}"


def _engine(engine: EngineState) -> tuple[str, ...]:
    known = [f"{name} {value}" for name, value in {**engine.versions, **engine.details}.items()]
    return engine.name, engine.state, engine.install or engine.error or ", ".join(known)


def _folder(folder: Folder) -> tuple[str, ...]:
    used = size(folder.size) if folder.whole else f"over {size(folder.size)}"
    return folder.name, folder.path, used, f"{_bytes(folder.free)} free"


def _bytes(count: int | None) -> str:
    return "?" if count is None else size(count) if count else "0 GB"
