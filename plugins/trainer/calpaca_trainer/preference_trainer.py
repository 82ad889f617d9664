"""Learning from preferences: TRL's losses (DPO, KTO) in our training, with our batches, checkpoints and record.

TRL computes the loss of a batch, and the log-probabilities of the frozen reference: a copy of the adapter as it began. What
it would do besides is left out: it reads no data, sends no telemetry and writes no model card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from datasets import Dataset as Table
from transformers import AutoTokenizer, TrainingArguments
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from calpaca_trainer.causal_trainer import CausalTrainer, Plan, Sharing
from calpaca_trainer.errors import TrainingError
from calpaca_trainer.learner import Learner
from calpaca_trainer.metrics import MetricsWriter
from calpaca_trainer.preference_data import PreferenceLoss, PreferredAnswers
from calpaca_trainer.recipe import PreferenceRecipe
from calpaca_trainer.saved import Saver


@dataclass(frozen=True)
class PreferenceCollator:
    """Rows as TRL takes them: ids, which of them are an answer's, and the numbers of the rows.

    DPO has the better answers of a batch before the worse. KTO has an answer a row, its label, and each prompt once more
    with the answer of the row before it, by which it estimates how far the model has moved (Ethayarajh et al. 2024).
    """

    pad_id: int
    loss: PreferenceLoss
    multiple: int = 8

    def __call__(self, packs: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
        examples = [example for pack in packs for example in pack]
        rows = [example["answers"] for example in examples]
        batch = self._pairs(rows) if self.loss == "dpo" else self._ratings(rows)
        return {**batch, "numbers": [[example["number"]] for example in examples]}

    def _pairs(self, rows: Sequence[PreferredAnswers]) -> dict[str, Any]:
        return self._padded([(row.prompt, row.chosen) for row in rows] + [(row.prompt, row.rejected) for row in rows])

    def _ratings(self, rows: Sequence[PreferredAnswers]) -> dict[str, Any]:
        answers = [row.chosen or row.rejected for row in rows]
        others = [answers[-1], *answers[:-1]]
        matched = self._padded([(row.prompt, answer) for row, answer in zip(rows, answers, strict=True)])
        moved = self._padded([(row.prompt, other) for row, other in zip(rows, others, strict=True)])
        labels = torch.tensor([row.chosen is not None for row in rows])
        return {**matched, **{f"KL_{name}": tensor for name, tensor in moved.items()}, "label": labels}

    def _padded(self, texts: Sequence[tuple[list[int], list[int] | None]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `completion_mask`, each [texts, longest rounded up]."""
        longest = max(len(prompt) + len(answer or ()) for prompt, answer in texts)
        shape = (len(texts), -(-longest // self.multiple) * self.multiple)
        ids = torch.full(shape, self.pad_id, dtype=torch.long)
        attended, answered = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for number, (prompt, answer) in enumerate(texts):
            end = len(prompt) + len(answer or ())
            ids[number, :end] = torch.tensor([*prompt, *(answer or ())])
            attended[number, :end] = 1
            answered[number, len(prompt) : end] = 1
        return {"input_ids": ids, "attention_mask": attended, "completion_mask": answered}


class _PreferenceTrainer(CausalTrainer):
    """What both have in common; TRL's trainer comes after it in the order of resolution."""

    def __init__(
        self,
        learner: Learner,
        *,
        args: TrainingArguments,
        plan: Plan,
        collator: PreferenceCollator,
        saver: Saver,
        metrics: MetricsWriter,
        sharing: Sharing,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self._plan, self.saver, self.metrics, self._sharing = plan, saver, metrics, sharing
        self._is_adapter = learner.is_adapter
        super(CausalTrainer, self).__init__(
            model=learner.model,
            args=args,
            data_collator=collator,
            train_dataset=Table.from_dict({"number": [0], "label": [True]}),  # it wants one; the batches are the plan's
            processing_class=AutoTokenizer.from_pretrained(str(learner.prompting.folder)),
            callbacks=[metrics, *callbacks],
        )

    def _prepare_dataset(self, dataset: Table, *_: Any) -> Table:
        return dataset

    def _send_telemetry(self) -> None:
        """None is sent."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """The run folder has a report."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over the rows of the evaluation data; TRL's log adds how often the better answer is preferred."""
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for batch in self._loader(list(self._plan.evaluation[self.args.process_index :: self.args.world_size])):
                count = len(batch["numbers"])
                inputs = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    total += total.new_tensor([float(self.compute_loss(self.model, inputs)) * count, count])
        total = self.accelerator.reduce(total)
        metrics = {"eval_loss": float(total[0] / total[1])}
        self.log(dict(metrics))
        self.model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _not_finite(self, inputs: dict[str, Any], numbers: list[list[int]]) -> TrainingError:  # noqa: ARG002
        places = ", ".join(self._plan.dataset.place(number) for row in numbers for number in row)
        return TrainingError(
            f"The loss is no longer a number in step {self.state.global_step + 1}, at {places}.",
            "Lower --learning-rate, or take these rows out; the last checkpoint is sound.",
        )


class PairTrainer(_PreferenceTrainer, DPOTrainer):  # type: ignore[misc]
    """Direct preference optimisation (Rafailov et al. 2023)."""


class RatingTrainer(_PreferenceTrainer, KTOTrainer):  # type: ignore[misc]
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024)."""


def choose_trainer(
    recipe: PreferenceRecipe, arguments: TrainingArguments, pad_id: int
) -> tuple[type[CausalTrainer], TrainingArguments, PreferenceCollator]:
    """The trainer of the recipe's loss, with its arguments and its collator."""
    kind = PairTrainer if recipe.loss == "dpo" else RatingTrainer
    return kind, _arguments(recipe, arguments), PreferenceCollator(pad_id, recipe.loss)


def _arguments(recipe: PreferenceRecipe, arguments: TrainingArguments) -> TrainingArguments:
    """The Trainer's arguments as TRL's, whose own defaults, checkpointing for one, are overridden."""
    values = {each.name: getattr(arguments, each.name) for each in fields(TrainingArguments) if each.init}
    if recipe.loss == "dpo":
        return DPOConfig(**values, beta=recipe.beta)  # type: ignore[no-any-return]
    values["train_sampling_strategy"] = "sequential"  # it insists; the order is the plan's
    return KTOConfig(  # type: ignore[no-any-return]
        **values, beta=recipe.beta, desirable_weight=recipe.good_weight, undesirable_weight=recipe.bad_weight
    )
