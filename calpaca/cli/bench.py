"""`calpaca bench`: what runs fastest here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calpaca.cli.group import Group
from calpaca.cli.run import shared_runtime
from calpaca.cli.table import size, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calpaca.core.engine_choice import Measurement


@click.group(cls=Group)
def bench() -> None:
    """Measure what runs fastest on this machine."""


@bench.command()
@click.option("--model", metavar="NAME", help="The model to measure with; default: the one in the settings.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME", help="LoRA adapters, in order.")
@click.option(
    "--engine", "names", multiple=True, metavar="NAME", help="Engines to measure; default: all that are installed."
)
@click.option("--dtype", default="auto", show_default=True, metavar="TEXT", help="float32, bfloat16 or float16.")
@click.option(
    "--streams", multiple=True, type=click.IntRange(1), default=(1, 8, 32), show_default=True,
    help="Requests at once; may be repeated.",
)  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a PNG of throughput.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def engines(
    model: str | None,
    adapters: tuple[str, ...],
    *,
    names: tuple[str, ...],
    dtype: str,
    streams: tuple[int, ...],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure the installed engines with a model, and let `--engine auto` take the best from now on.

    Each engine runs in a process of its own. The result is kept for this machine and this model.
    """
    from calpaca.core.engine_bench import measure
    from calpaca.core.engine_choice import PURPOSES, check_engines, choose_engine, local_engines, machine, model_key
    from calpaca.core.engine_choice import record_measurements as record
    from calpaca.core.files import find_files
    from calpaca.core.spec import AdapterSpec, ModelSpec

    runtime = shared_runtime()
    given = ModelSpec(model=model, adapters=tuple(map(AdapterSpec.model_validate, adapters)), dtype=dtype)
    spec = runtime.spec(given)
    chosen = check_engines(names, runtime) or local_engines(runtime)
    files = find_files(spec, runtime)
    measurements = []
    for name in chosen:
        click.echo(f"Measuring {name} …", err=True)
        measurements.append(measure(name, spec, sorted(set(streams))))
    record(model_key(files), measurements)
    if plot is not None:
        from calpaca.core.engine_plot import plot_throughput

        plot_throughput(measurements, plot, f"{files.name} on {machine()}")
    auto = {purpose: choose_engine(files, runtime, purpose) for purpose in PURPOSES}
    if as_json:
        results = [asdict(each) for each in measurements]
        result = {"machine": machine(), "model": files.name, "engines": results, "auto": auto}
        click.echo(json.dumps(result, ensure_ascii=False, indent=2))
    else:
        click.echo(_table(measurements, sorted(set(streams))))
        click.echo(f"--engine auto takes {auto['chat']} for one request at a time, {auto['load']} for many.")
    if all(each.error for each in measurements):
        raise SystemExit(1)


def _table(measurements: Sequence[Measurement], streams: Sequence[int]) -> str:
    headings = ("ENGINE", *(f"{count} AT ONCE" for count in streams), "FIRST TOKEN", "LOAD", "MEMORY", "WEIGHTS")
    return table(headings, [_row(each, streams) for each in measurements])


def _row(measured: Measurement, streams: Sequence[int]) -> tuple[str, ...]:
    if measured.error is not None:
        return (measured.engine, *["-"] * (len(streams) + 3), measured.error)
    speeds = (f"{measured.tokens_per_second[count]:.0f} tok/s" for count in streams)
    weights = measured.details.get("weights") or measured.details.get("dtype", "")
    first, load = f"{measured.first_token * 1000:.0f} ms", f"{measured.load:.1f} s"
    return (measured.engine, *speeds, first, load, size(measured.memory), weights)
