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
        last = (read_metrics(folder) or [{}])[-1]  # of the part of the run that was done before
        self._began: float = time.monotonic() - last.get("seconds", 0.0)
        self.tokens = last.get("tokens", 0)
        self._new = 0

    @property
    def seconds(self) -> float:
        """Since the run began, without what lay between its parts."""
        return time.monotonic() - self._began

    def count(self, tokens: int) -> None:
        """Note tokens that this process has trained on."""
        self._new += tokens

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        values = {name: value for name, value in (logs or {}).items() if name in _KEPT}
        if not values:
            return
        self.tokens += _sum_over_processes(self._new)
        self._new = 0
        if not state.is_world_process_zero:
            return
        seconds = round(self.seconds, 3)
        record = {"step": state.global_step, **values, "tokens": self.tokens, "seconds": seconds}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _sum_over_processes(count: int) -> int:
    from torch import distributed, tensor

    if not distributed.is_available() or not distributed.is_initialized():
        return count
    total = tensor(count)
    distributed.all_reduce(total)
    return int(total)


_REWARDS = ("rewards/accuracies", "rewards/margins")  # of preferences: how often, and by how much, the better is better
_KEPT = {
    "loss", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity", *_REWARDS, *(f"eval_{name}" for name in _REWARDS),
}  # fmt: skip


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
