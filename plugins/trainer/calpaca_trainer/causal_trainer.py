"""transformers' Trainer with our batches, our loss, our measurement, and checkpoints that are opened again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from calpaca_trainer.batches import Batch
from calpaca_trainer.collator import IGNORED, Collator, PackedRows
from calpaca_trainer.dataset import Dataset
from calpaca_trainer.errors import TrainingError
from calpaca_trainer.learner import Learner
from calpaca_trainer.metrics import MetricsWriter
from calpaca_trainer.processes import Processes
from calpaca_trainer.saved import Saver, mark_complete, restore
from calpaca_trainer.sharding import Sharding


@dataclass(frozen=True)
class Plan:
    """The examples, the batches to train on, and those to measure on."""

    dataset: Dataset
    batches: Sequence[Batch]
    evaluation: Sequence[Batch]


@dataclass(frozen=True)
class Sharing:
    """The processes, and what of the model each of them holds."""

    processes: Processes = field(default_factory=Processes)
    sharding: Sharding = field(default_factory=Sharding)


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
        sharing: Sharing,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self._plan, self.saver, self.metrics, self._sharing = plan, saver, metrics, sharing
        measured: Any = PackedRows(plan.dataset, len(plan.dataset)) if plan.evaluation else None
        super().__init__(
            learner.model, args, data_collator=collator, eval_dataset=measured, callbacks=[metrics, *callbacks]
        )
        self._is_adapter = learner.is_adapter
        self.is_distributed_loading_by_transformers = sharing.sharding.in_place

    # Processes -------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        self._sharing.sharding.shard(self.model)
        return super().create_optimizer(model)

    def _prepare_for_training(self, *arguments: Any, **options: Any) -> Any:
        prepared = super()._prepare_for_training(*arguments, **options)
        self._sharing.sharding.check(self.model_wrapped)
        return prepared

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Gradients of FSDP2 are shared out after each part of a batch, so that none lies whole in between. Trainer's own
        way asks for a configuration that only models have which transformers has shared out."""
        return nullcontext()

    def weights(self) -> Mapping[str, torch.Tensor] | None:
        """What is saved, as whole tensors, in the first process; all of them call it."""
        return self._sharing.sharding.weights(self.model, trained=self._is_adapter)

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
            self.metrics.count(inputs["input_ids"].numel())
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not torch.isfinite(loss[0] if return_outputs else loss):
            raise self._not_finite(inputs, numbers)
        return loss

    def _not_finite(self, inputs: dict[str, Any], numbers: list[list[int]]) -> TrainingError:
        """The error that names the rows whose own loss is not finite."""
        guilty = numbers
        if not self._sharing.sharding.collective:  # the others would wait for a pass that only this process makes
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
        own = list(self._plan.evaluation[self.args.process_index :: self.args.world_size])
        passes = math.ceil(len(self._plan.evaluation) / self.args.world_size)
        spare = self._plan.evaluation[: passes - len(own)]  # all make as many passes; these do not count
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for number, batch in enumerate(self._loader([*own, *spare])):
                inputs = self._prepare_inputs({name: value for name, value in batch.items() if name != "numbers"})
                count = (inputs["labels"][:, 1:] != IGNORED).sum()
                with self.accelerator.autocast():
                    loss = self.model(**inputs).loss
                if number < len(own):
                    sums += torch.stack([loss.double() * count, count.double()])
        self.model.train(training)
        sums = self.accelerator.reduce(sums)
        return sums[0], sums[1]

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what was learnt; all processes call it. What the Trainer does not ask for itself is final."""
        weights, folder = self.weights(), Path(output_dir or self.args.output_dir)
        self._sharing.processes.agree(lambda: self.saver.save(folder, weights, final=not _internal_call))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, sharding = Path(output_dir), self._sharing.sharding
        if not sharding.save_optimizer(self.model, self.optimizer, folder / OPTIMIZER_NAME):
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, sharding = Path(checkpoint), self._sharing.sharding
        if not sharding.load_optimizer(self.model, self.optimizer, folder / OPTIMIZER_NAME):
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes the state of its own noise
        if self.args.should_save:
            mark_complete(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore(model or self.model, Path(resume_from_checkpoint))
