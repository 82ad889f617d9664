"""A training run from recipe to run folder."""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calpaca.core.disk import megabytes
from calpaca.core.errors import UsageError
from calpaca.core.files import ModelFiles, find_files
from calpaca.core.fingerprint import fingerprint
from calpaca.core.lock import exclusive
from calpaca.core.machine import describe_memory
from calpaca.core.spec import AdapterSpec, ModelSpec
from calpaca_trainer.batches import Batch, BatchOptions, most_tokens, plan_batches, plan_evaluation, split
from calpaca_trainer.dataset import Dataset, DataSource, Stage, load_dataset
from calpaca_trainer.estimate import MemoryEstimate, estimate_memory
from calpaca_trainer.preference_data import check_surroundings, load_preferences
from calpaca_trainer.processes import Processes, find_processes
from calpaca_trainer.prompting import Prompting, load_prompting
from calpaca_trainer.recipe import PreferenceRecipe, Recipe
from calpaca_trainer.reporters import check_reporters, others, tensorboard
from calpaca_trainer.run_folder import RunFolder
from calpaca_trainer.sharding import Sharding, choose_sharding
from calpaca_trainer.vocabulary_pair import check_vocabularies

if TYPE_CHECKING:
    import numpy as np

    from calpaca.core.jobs import Job
    from calpaca.core.runtime import Runtime
    from calpaca_trainer.causal_trainer import CausalTrainer
    from calpaca_trainer.learner import Learner
    from calpaca_trainer.samples import SamplePrompt

log = logging.getLogger("calpaca")

_TOLD_OTHERWISE = {
    "model", "adapter", "tokenizer", "datasets", "eval_datasets", "processes", "deepspeed", "fsdp",
}  # fmt: skip
"""Fields whose content is compared, not their name."""
_FEW = 50  # examples; with fewer a model learns them by heart


@dataclass(frozen=True)
class Preparation:
    """Everything that is decided before weights are loaded."""

    stage: Stage
    recipe: Recipe
    files: ModelFiles
    prompting: Prompting
    dataset: Dataset
    members: np.ndarray
    kept: np.ndarray
    batches: list[Batch]
    evaluation: list[Batch]
    estimate: MemoryEstimate
    checkpointing: bool
    processes: Processes = field(default_factory=Processes)
    sharding: Sharding = field(default_factory=Sharding)

    @property
    def step_batches(self) -> int:
        """Batches in a step, of all processes together."""
        return self.recipe.accumulation * self.processes.count

    @property
    def steps(self) -> int:
        return math.ceil(len(self.batches) / self.step_batches)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {
            "stage": self.stage,
            "processes": self.processes.count,
            **self.recipe.model_dump(mode="json", exclude=_TOLD_OTHERWISE),
            **self.sharding.identity(),
            "base": fingerprint(self.files.weights),
            "adapters": [fingerprint(adapter.path) for adapter in self.files.adapters],
            "data": self.dataset.digest,
            "template": self.prompting.template_digest,
        }


def prepare(recipe: Recipe, stage: Stage, runtime: Runtime) -> Preparation:
    """Find the model, read and check the data, plan the batches, estimate the memory. Raises CalpacaError."""
    processes = find_processes()
    processes.join()
    return processes.in_turn(lambda: _prepare(recipe, stage, runtime, processes))


def _prepare(recipe: Recipe, stage: Stage, runtime: Runtime, processes: Processes) -> Preparation:
    if not recipe.datasets:
        raise UsageError("There is nothing to train on.", "Name a file or folder with --dataset.")
    check_reporters(recipe.report_to)
    recipe = recipe.model_copy(update={"device": processes.place(recipe.device)})
    sharding = choose_sharding(recipe, processes, _dtype(recipe))
    files, prompting = load_subject(recipe, runtime)
    dataset, members, kept = _load_data(recipe, stage, prompting)
    options = BatchOptions(
        recipe.batch_size, recipe.max_length, recipe.accumulation * processes.count, recipe.packing, recipe.seed
    )
    batches = plan_batches(dataset, members, options, epochs=recipe.epochs, max_steps=recipe.max_steps)
    batches = _shared(batches, processes.count)
    estimate, checkpointing = _estimate(recipe, files, most_tokens(batches, dataset))
    if len(members) < _FEW:
        log.warning(
            "There are only %d examples: the model may learn them by heart and forget other things.", len(members)
        )
    return Preparation(
        stage, recipe, files, prompting, dataset, members, kept, batches,
        plan_evaluation(dataset, kept, options), estimate, checkpointing, processes, sharding,
    )  # fmt: skip


def _shared(batches: list[Batch], count: int) -> list[Batch]:
    """As many batches for each of `count` processes. Raises UsageError where there are fewer than processes."""
    if len(batches) < count:
        raise UsageError(f"There are {len(batches)} batches for {count} processes.", "Lower --batch-size.")
    return batches[: len(batches) // count * count]


def load_subject(recipe: Recipe, runtime: Runtime) -> tuple[ModelFiles, Prompting]:
    """The files of the model that learns, and how texts become its tokens. Raises ModelError or UsageError."""
    files = find_files(_spec(recipe, runtime), runtime)
    prompting = load_prompting(files)
    check_vocabularies(files, prompting.tokenizer)
    return files, prompting


def _spec(recipe: Recipe, runtime: Runtime) -> ModelSpec:
    adapters = (AdapterSpec(source=recipe.adapter),) if recipe.adapter else ()
    wanted = ("model", "tokenizer", "chat_template", "device", "quantization", "revision")
    spec = runtime.spec(ModelSpec(adapters=adapters, **{name: getattr(recipe, name) for name in wanted}))
    if not runtime.is_local(spec):
        raise UsageError(f"{spec} runs on a server and cannot be trained.", "Name weights on this machine.")
    return spec


def _load_data(recipe: Recipe, stage: Stage, prompting: Prompting) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """All examples, the numbers of those to train on, and of those to measure on."""
    import numpy as np

    load = _reader(recipe, stage, prompting)
    dataset = load(recipe.sources)
    members, kept = split(dataset, recipe.eval_share, recipe.seed)
    if recipe.eval_datasets:
        measured = load([DataSource.parse(text) for text in recipe.eval_datasets])
        kept = np.concatenate([kept, np.arange(len(dataset), len(dataset) + len(measured))])
        dataset = dataset + measured
    if dataset.faults and find_processes().is_first:
        log.warning(
            "%d rows cannot be used and are left out; the first: %s. `calpaca train data check` lists them all.",
            len(dataset.faults), dataset.faults[0],
        )  # fmt: skip
    return dataset, members, kept


def _reader(recipe: Recipe, stage: Stage, prompting: Prompting) -> Callable[[Sequence[DataSource]], Any]:
    """What reads and renders data for the stage."""
    if isinstance(recipe, PreferenceRecipe):
        check_surroundings(find_processes().count)
        return partial(load_preferences, renderer=prompting.answers(recipe), loss=recipe.loss)
    return partial(load_dataset, rendering=prompting.rendering(recipe, stage))


def _estimate(recipe: Recipe, files: ModelFiles, tokens: int) -> tuple[MemoryEstimate, bool]:
    """The memory that is needed with `tokens` in the largest batch, and whether activations are to be computed twice to save some."""
    from calpaca.core.merge.base_model import read_base

    base = read_base(files.weights)
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    width = 2 if _dtype(recipe) == "bfloat16" else 4
    estimate = estimate_memory(recipe, shapes, base.text_config, width=width, tokens=tokens)
    if recipe.checkpointing != "auto":
        return estimate, recipe.checkpointing == "on"
    room = _room(recipe.device)
    return estimate, room is not None and estimate.total(checkpointing=False) > room


def _dtype(recipe: Recipe) -> str:
    """What is computed in."""
    from calpaca.core.weights import choose_device
    from calpaca_trainer.learner import choose_training_dtype

    return choose_training_dtype(recipe, choose_device(recipe.device))


def _room(device: str) -> int | None:
    """Bytes that are free where the model is trained."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info()[0])
    return describe_memory().room


def train(preparation: Preparation, output: Path, runtime: Runtime, command: Mapping[str, Any]) -> dict[str, Any]:
    """Train, or go on with a run that was interrupted; returns the summary that lies in the run folder.

    `command` is what `calpaca jobs resume` gives again. Raises UsageError for a folder that holds something else,
    TrainingError and DownloadError for a run that must stop; its last whole checkpoint is kept.
    """
    from calpaca_trainer.malloc import keep_memory

    keep_memory()
    folder, processes = RunFolder(output), preparation.processes
    with ExitStack() as held:
        if processes.is_first:
            held.enter_context(exclusive(output))
        goes_on = processes.agree(lambda: folder.begin(preparation.identity(), preparation.recipe))
        job = (
            runtime.jobs.start("train", f"train {output}", {**command, "output": str(output)})
            if processes.is_first
            else None
        )
        held.enter_context(job or nullcontext())
        with processes.noticing():
            run = processes.together(lambda: _Run(preparation, folder, job))
            return run.carry_out(goes_on=goes_on)


class _Run:
    """A run in hand."""

    def __init__(self, preparation: Preparation, folder: RunFolder, job: Job | None) -> None:
        from calpaca_trainer.learner import load_learner
        from calpaca_trainer.samples import choose_prompts

        self._preparation, self._folder, self._job = preparation, folder, job
        self._processes = preparation.processes
        self._learner: Learner = load_learner(preparation.recipe, preparation.files, preparation.prompting)
        if self._learner.mixed and not preparation.sharding.autocasts:
            raise UsageError(
                "DeepSpeed computes in one type, and here layers that learn whole meet a base in bfloat16.",
                "Add --dtype float32.",
            )
        self._trained_parameters = sum(parameter.numel() for _, parameter in self._learner.trained())
        members = preparation.kept if len(preparation.kept) else preparation.members
        self._prompts: list[SamplePrompt] = choose_prompts(
            preparation.dataset, members.tolist(), preparation.recipe.samples
        )

    def carry_out(self, *, goes_on: bool) -> dict[str, Any]:
        from calpaca_trainer.metrics import forget_metrics_after
        from calpaca_trainer.saved import check_effect, last_checkpoint, norms

        before = norms(dict(self._learner.trained()))
        checkpoint = self._processes.agree(lambda: last_checkpoint(self._folder.path) if goes_on else None)
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else -1
        if self._processes.is_first:
            forget_metrics_after(self._folder.path, step)
        trainer = self._trainer()
        if checkpoint is None:
            self._measure_before(trainer)
        else:
            log.info("Going on after step %d of %d.", step, self._preparation.steps)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        weights = trainer.weights()
        self._processes.agree(lambda: check_effect(weights or {}, before))
        return self._finish(trainer)

    def _trainer(self) -> CausalTrainer:
        from transformers import PrinterCallback

        from calpaca_trainer.causal_trainer import CausalTrainer, Plan, Sharing
        from calpaca_trainer.collator import Collator
        from calpaca_trainer.metrics import MetricsWriter, Patience
        from calpaca_trainer.progress import Progress
        from calpaca_trainer.saved import Saver

        it, recipe = self._preparation, self._preparation.recipe
        patience = [Patience(recipe.patience)] if recipe.patience is not None else []
        args, pad_id = training_arguments(it, self._folder.path, self._learner), it.prompting.eos_ids[0]
        kind: type[CausalTrainer] = CausalTrainer
        collator: Any = Collator(pad_id, recipe.packing, multiple=self._learner.length_step)
        if isinstance(recipe, PreferenceRecipe):
            from calpaca_trainer.preference_trainer import choose_trainer

            kind, args, collator = choose_trainer(recipe, args, pad_id)
        trainer = kind(
            self._learner,
            args=args,
            plan=Plan(it.dataset, it.batches, it.evaluation),
            collator=collator,
            saver=Saver(self._learner, recipe.model or it.files.name, self._settings()),
            metrics=MetricsWriter(self._folder.path),
            sharing=Sharing(self._processes, it.sharding),
            callbacks=[Progress(self._job), *patience, *tensorboard(recipe.report_to, self._folder.path)],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _settings(self) -> dict[str, Any]:
        """What the lineage tells about the training."""
        it, recipe = self._preparation, self._preparation.recipe
        settings: dict[str, Any] = {
            "stage": it.stage,
            "method": recipe.method,
            "steps": it.steps,
            "data": it.dataset.digest,
        }
        if recipe.adapter:
            settings["continues"] = fingerprint(it.files.adapters[0].path)
        return settings

    def _measure_before(self, trainer: CausalTrainer) -> None:
        from calpaca_trainer.samples import read_prompt, write_answers

        if self._preparation.evaluation:
            trainer.evaluate()
        if not self._takes_part:
            return
        answers = write_answers(self._learner, self._prompts)
        samples = [
            replace(read_prompt(self._learner, prompt), before=answer)
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]
        if self._processes.is_first:
            self._folder.write_samples([sample.to_dict() for sample in samples])

    @property
    def _takes_part(self) -> bool:
        """Whether this process writes answers: the first does, and all where the model is shared out."""
        return self._processes.is_first or self._preparation.sharding.collective

    def _finish(self, trainer: CausalTrainer) -> dict[str, Any]:
        measured = [record["step"] for record in trainer.state.log_history if "eval_loss" in record]
        if self._preparation.evaluation and measured[-1:] != [trainer.state.global_step]:
            trainer.evaluate()
        answers = self._answers_after(trainer)
        summary = self._processes.agree(lambda: self._record(trainer, answers))
        trainer.save_model(str(self._folder.path))
        return summary

    def _answers_after(self, trainer: CausalTrainer) -> list[str]:
        from calpaca_trainer.samples import write_answers

        if not self._takes_part:
            return []
        with self._preparation.sharding.unsharded(trainer.model):
            return write_answers(self._learner, self._prompts)

    def _record(self, trainer: CausalTrainer, answers: list[str]) -> dict[str, Any]:
        """Write down how it went; the summary."""
        self._folder.write_samples(
            [{**sample, "after": answer} for sample, answer in zip(self._folder.read_samples(), answers, strict=True)]
        )
        summary = self._summary(trainer)
        self._folder.write_summary(summary)
        return summary

    def _summary(self, trainer: CausalTrainer) -> dict[str, Any]:
        from calpaca_trainer.metrics import read_metrics

        it, recipe = self._preparation, self._preparation.recipe
        records = read_metrics(self._folder.path)
        measured = [record["eval_loss"] for record in records if "eval_loss" in record]
        tokens, seconds = trainer.metrics.tokens, trainer.metrics.seconds
        summary = {
            "base": recipe.model or it.files.name,
            "method": "full" if not self._learner.is_adapter else "adapter",
            "trained_parameters": self._trained_parameters,
            "examples": len(it.members),
            "left_out": len(it.dataset.faults),
            "steps": trainer.state.global_step,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "processes": f"{it.processes.count}, {it.sharding.name}" if it.processes.count > 1 else 1,
            "peak_memory": megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        }
        if measured:
            summary |= {"held_out_loss_before": round(measured[0], 4), "held_out_loss_after": round(measured[-1], 4)}
        return summary


def training_arguments(preparation: Preparation, output: Path, learner: Learner) -> Any:
    """The recipe in the Trainer's words."""
    from transformers import TrainingArguments

    recipe, steps = preparation.recipe, preparation.steps
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.rate,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=round(recipe.warmup * steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        neftune_noise_alpha=recipe.neftune,
        activation_checkpointing=preparation.checkpointing,
        seed=recipe.seed,
        use_cpu=learner.device == "cpu",
        ddp_backend="gloo" if learner.device == "cpu" and preparation.processes.count > 1 else None,
        ddp_find_unused_parameters=False if preparation.processes.count > 1 else None,
        bf16=learner.mixed or preparation.sharding.casts,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep,
        eval_strategy="steps" if recipe.eval_every and preparation.evaluation else "no",
        eval_steps=recipe.eval_every,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=others(recipe.report_to),
        disable_tqdm=True,
        restore_callback_states_from_checkpoint=recipe.patience is not None,
        **preparation.sharding.arguments(),
    )
