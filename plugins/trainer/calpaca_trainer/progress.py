"""How far training is: a bar on a terminal's stderr, and the count in the job ledger."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from calpaca.core.jobs import Job


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows steps, loss and the time left."""

    def __init__(self, job: Job | None) -> None:
        self._job = job
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any  # noqa: ARG002
    ) -> None:  # fmt: skip
        shown = None if state.is_world_process_zero else True  # None: on a terminal only
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=shown, leave=False)
        if self._job is not None:
            self._job.expect(state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any  # noqa: ARG002
    ) -> None:  # fmt: skip
        self._bar.update(state.global_step - self._bar.n)
        if self._job is not None:
            self._job.done = state.global_step

    def on_save(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if self._job is not None:
            self._job.expect(state.max_steps)  # which records what is done, too

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any  # noqa: ARG002
    ) -> None:  # fmt: skip
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any  # noqa: ARG002
    ) -> None:  # fmt: skip
        self._bar.close()
