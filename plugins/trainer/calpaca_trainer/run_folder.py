"""The folder of a run: what was trained, on what, how it went, and what came of it.

Weights, tokenizer, template and `calpaca-manifest.json` lie at its top, so it is an adapter or a model as it is. Beside
them are `metrics.jsonl`, `loss.png`, `report.md` and `recipe.toml`; `record/` holds what the run must not differ in when
it goes on, the environment, and the samples.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from calpaca.core.checkpoint.lineage import versions
from calpaca.core.checkpoint.manifest import MANIFEST
from calpaca.core.errors import UsageError
from calpaca.core.machine import describe_memory, describe_processor, find_gpus
from calpaca_trainer.metrics import read_metrics
from calpaca_trainer.recipe import Recipe

_TRAINING = ("accelerate", "calpaca-trainer")
_RECIPE = "recipe.toml"
_IDENTITY, _ENVIRONMENT, _SAMPLES, _SUMMARY = "identity.json", "environment.json", "samples.json", "summary.json"


@dataclass(frozen=True)
class RunFolder:
    """A run's folder."""

    path: Path

    @property
    def is_finished(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def begin(self, identity: Mapping[str, Any], recipe: Recipe) -> bool:
        """Make the folder, or find that it holds this very run unfinished; whether it does.

        Raises UsageError for a folder of something else, of a finished run, or of one with other settings or data.
        """
        earlier = self._read(_IDENTITY)
        if earlier is None and self._names() <= {
            "record",
            _RECIPE,
        }:  # nothing, or what a kill left at the very beginning
            self._write(_ENVIRONMENT, describe_environment())
            (self.path / _RECIPE).write_text(to_toml(recipe), "utf-8")
            self._write(_IDENTITY, identity)
            return False
        if earlier is None:
            raise UsageError(f"{self.path} exists already and is no run of training.", "Name another --output.")
        if self.is_finished:
            raise UsageError(f"{self.path} holds a finished run.", "Name another --output, or remove it first.")
        changed = sorted(name for name in {*earlier, *identity} if earlier.get(name) != identity.get(name))
        if changed:
            told = "; ".join(
                f"{name} was {_short(earlier.get(name))}, is {_short(identity.get(name))}" for name in changed
            )
            raise UsageError(
                f"{self.path} holds an unfinished run that began differently: {told}.",
                "Give the same settings and data to go on with it, or name another --output.",
            )
        return True

    def _names(self) -> set[str]:
        """What lies in the folder, or the file that is in its place."""
        if self.path.is_file():
            return {self.path.name}
        return {each.name for each in self.path.iterdir()} if self.path.exists() else set()

    def _write(self, name: str, content: Any) -> None:
        file = self.path / "record" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{name}.part")
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        part.replace(file)

    def _read(self, name: str) -> Any:
        file = self.path / "record" / name
        return json.loads(file.read_text("utf-8")) if file.is_file() else None

    def write_samples(self, samples: Sequence[Mapping[str, str]]) -> None:
        self._write(_SAMPLES, list(samples))

    def read_samples(self) -> list[dict[str, str]]:
        return self._read(_SAMPLES) or []

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """The outcome, as JSON and as a report; and the plot."""
        self._write(_SUMMARY, summary)
        records = read_metrics(self.path)
        plot_losses(records, self.path / "loss.png")
        text = "\n".join(
            [
                *_report(summary, records, self.read_samples()),
                *_origins(self._read(_IDENTITY), self._read(_ENVIRONMENT)),
            ]
        )
        (self.path / "report.md").write_text(text + "\n", "utf-8")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def to_toml(recipe: Recipe) -> str:
    """The recipe as a file that can be given again. JSON's texts, numbers and lists are TOML's."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())


def describe_environment() -> dict[str, Any]:
    """Versions, processor, memory and GPUs."""
    processor = describe_processor()
    return {
        "python": platform.python_version(),
        "versions": versions() | {name: metadata.version(name) for name in _TRAINING},
        "processor": processor.name,
        "instruction_sets": list(processor.instruction_sets),
        "cores": processor.usable_cores,
        "memory": describe_memory().total,
        "gpus": [gpu.name for gpu in find_gpus()],
    }


def plot_losses(records: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Losses and learning rate over the steps, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label in (("loss", "training loss"), ("eval_loss", "loss on held-out data")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if name == "eval_loss" else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    rates = [(record["step"], record["learning_rate"]) for record in records if "learning_rate" in record]
    if rates:
        other = axes.twinx()
        other.plot(*zip(*rates, strict=True), color="0.7", label="learning rate")
        other.set_ylabel("learning rate")
    figure.legend(loc="upper right")
    figure.savefig(file, dpi=120)


def _report(
    summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, str]]
) -> Iterator[str]:
    yield f"# Training of {summary['base']}\n"
    yield "| | |\n| --- | --- |"
    yield from (f"| {name.replace('_', ' ')} | {value} |" for name, value in summary.items())
    losses = [record["loss"] for record in records if "loss" in record]
    if losses:
        some = -(-len(losses) // 10)  # batches differ more from each other than a step changes
        first, last = fmean(losses[:some]), fmean(losses[-some:])
        yield f"\nTraining loss: {first:.4f} in the mean of the first {some} records, {last:.4f} of the last {some}.\n"
    yield "![Losses and learning rate](loss.png)"
    for number, sample in enumerate(samples, 1):
        yield f"\n## Sample {number}\n"
        for name in ("prompt", "wanted", "before", "after"):
            quoted = sample[name].strip().replace("\n", "\n> ")
            yield f"**{name.capitalize()}**\n\n> {quoted}\n"


def _origins(identity: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterator[str]:
    """What it was made of, by content, and with what."""
    yield "\n## What it was made of\n\n| | |\n| --- | --- |"
    for name in ("base", "adapters", "data", "template"):
        found = identity.get(name)
        yield f"| {name} | {', '.join(found) if isinstance(found, list) else found} |"
    yield f"| versions | {', '.join(f'{name} {version}' for name, version in environment['versions'].items())} |"
    yield f"| processor | {environment['processor']}, {environment['cores']} cores |"
    yield "\nAll options are in [recipe.toml](recipe.toml), all measurements in [metrics.jsonl](metrics.jsonl)."
