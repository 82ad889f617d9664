"""transformers' Trainer with our batches, our loss, our measurement, and checkpoints that are opened again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from calpaca_trainer.batches import Batch
from calpaca_trainer.collator import IGNORED, Collator, PackedRows
from calpaca_trainer.dataset import Dataset
from calpaca_trainer.errors import TrainingError
from calpaca_trainer.learner import Learner
from calpaca_trainer.metrics import MetricsWriter
from calpaca_trainer.saved import Saver, mark_complete, restore


@dataclass(frozen=True)
class Plan:
    """The examples, the batches to train on, and those to measure on."""

    dataset: Dataset
    batches: Sequence[Batch]
    evaluation: Sequence[Batch]


class CausalTrainer(Trainer):  # type: ignore[misc]
    """Trains `learner` on planned batches. `loss` in its log is the mean over the learnt tokens of a step."""

    control: Any

    def __init__(
        self,
        learner: Learner,
        *,
        args: TrainingArguments,
        plan: Plan,
        collator: Collator,
        saver: Saver,
        metrics: MetricsWriter,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self._plan, self.saver, self.metrics = plan, saver, metrics
        measured: Any = PackedRows(plan.dataset, len(plan.dataset)) if plan.evaluation else None
        super().__init__(
            learner.model, args, data_collator=collator, eval_dataset=measured, callbacks=[metrics, *callbacks]
        )

    # Data ------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self.accelerator.prepare(self._loader(self._plan.batches))  # type: ignore[no-any-return]

    def _loader(self, batches: Sequence[Batch]) -> DataLoader[Any]:
        return DataLoader(
            PackedRows(self._plan.dataset, len(self._plan.dataset)),  # type: ignore[arg-type]
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # one of its own: the order must not depend on noise that was drawn before
        )

    # Loss ------------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        numbers = inputs.pop("numbers")
        if self.model.training:
            self.metrics.tokens += int(inputs["input_ids"].numel()) * self.args.world_size
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not torch.isfinite(loss[0] if return_outputs else loss):
            raise self._not_finite(inputs, numbers)
        return loss

    def _not_finite(self, inputs: dict[str, Any], numbers: list[list[int]]) -> TrainingError:
        """The error that names the rows whose own loss is not finite."""
        with torch.no_grad():
            losses = [float(self._row_loss(inputs, at)) for at in range(len(numbers))]
        guilty = [row for row, loss in zip(numbers, losses, strict=True) if not math.isfinite(loss)] or numbers
        places = ", ".join(self._plan.dataset.place(number) for row in guilty for number in row)
        return TrainingError(
            f"The loss is no longer a number in step {self.state.global_step + 1}, at {places}.",
            "Lower --learning-rate, or take these rows out; the last checkpoint is sound.",
        )

    def _row_loss(self, inputs: dict[str, Any], at: int) -> torch.Tensor:
        row = {name: tensor[at : at + 1] for name, tensor in inputs.items() if torch.is_tensor(tensor)}
        loss: torch.Tensor = self.model(**row).loss
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over all learnt tokens of the evaluation data, and its exponential."""
        total, count = self._sums()
        loss = float(total / count)
        metrics = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss, and how many tokens it is over."""
        own = self._plan.evaluation[self.args.process_index :: self.args.world_size]
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for batch in self._loader(own):
                inputs = self._prepare_inputs({name: value for name, value in batch.items() if name != "numbers"})
                count = (inputs["labels"][:, 1:] != IGNORED).sum()
                with self.accelerator.autocast():
                    sums += torch.stack([self.model(**inputs).loss.double() * count, count.double()])
        self.model.train(training)
        sums = self.accelerator.reduce(sums)
        return sums[0], sums[1]

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.saver.save(Path(output_dir or self.args.output_dir), state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes the state of its own noise
        if self.args.should_save:
            mark_complete(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore(model or self.model, Path(resume_from_checkpoint))
