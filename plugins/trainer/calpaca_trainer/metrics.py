"""What is measured while a model learns, one JSON line a step; and stopping when it no longer helps."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from calpaca.core.paths import atomic_file

FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run folder, in order. A line that a kill cut off is left out."""
    file = folder / FILE
    records = []
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def forget_metrics_after(folder: Path, step: int) -> None:
    """Remove records of steps that will be done again."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(folder) if record["step"] <= step]
    with atomic_file(folder / FILE) as part:
        part.write_text("".join(kept), "utf-8")


class MetricsWriter(TrainerCallback):  # type: ignore[misc]
    """Writes a line for every step and every measurement. Losses are not rounded."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._began = time.monotonic()
        self.tokens = 0

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        values = {name: value for name, value in (logs or {}).items() if name in _KEPT}
        if not values or not state.is_world_process_zero:
            return
        seconds = round(time.monotonic() - self._began, 3)
        record = {"step": state.global_step, **values, "tokens": self.tokens, "seconds": seconds}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


_KEPT = {"loss", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity"}


class Patience(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Stops after `most` measurements without a lower loss."""

    def __init__(self, most: int, best: float | None = None, waited: int = 0) -> None:
        self.most, self.best, self.waited = most, best, waited

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        loss = metrics["eval_loss"]
        if self.best is None or loss < self.best:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        control.should_training_stop = self.waited >= self.most

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"args": {"most": self.most}, "attributes": {"best": self.best, "waited": self.waited}}
