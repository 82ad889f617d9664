"""A picture of measured engines: throughput against requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calpaca.core.engine_choice import Measurement
from calpaca.core.errors import MissingExtraError


def plot_throughput(measurements: Sequence[Measurement], file: Path, title: str) -> None:
    """Write a PNG. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("A plot", "plot", error.name or "matplotlib") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")  # without pyplot: no window system is asked for
    axes = figure.subplots()
    for measured in measurements:
        if measured.error is None:
            streams = sorted(measured.tokens_per_second)
            axes.plot(
                streams, [measured.tokens_per_second[each] for each in streams], marker="o", label=measured.engine
            )
    axes.set(title=title, xlabel="requests at once", ylabel="new tokens per second", ylim=(0, None))
    axes.set_xscale("log", base=2)
    ticks = sorted({streams for measured in measurements for streams in measured.tokens_per_second})
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(file, format="png", dpi=150)
