"""A recipe: everything that decides a training run, from a TOML or YAML file and from flags."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from calpaca.core.errors import UsageError
from calpaca.plugins.options import Flag, read_options
from calpaca_trainer.dataset import DataSource

Schedule = Literal["linear", "cosine", "constant"]


class DataOptions(BaseModel):
    """What is trained on, and how it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    datasets: Annotated[list[str], Flag("dataset")] = Field(
        [], description="File or folder to train on; repeat for several. PATH@0.5 takes half of its rows in an epoch."
    )
    max_length: int = Field(1024, ge=8, description="Most tokens of an example; an answer is never cut.")
    loss_on: Literal["all", "last"] = Field("all", description="Learn all answers of a conversation, or the last.")
    unit: Literal["document", "line"] = Field("document", description="What one text of a .txt file is.")

    @property
    def sources(self) -> list[DataSource]:
        return [DataSource.parse(text) for text in self.datasets]


class SubjectOptions(BaseModel):
    """Which model learns."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str | None = Field(None, description="Base model: catalogue name, hub id, folder or name from the settings.")
    adapter: str | None = Field(None, description="LoRA adapter to go on training.")
    tokenizer: str | None = Field(None, description="Folder or id of another tokenizer.")
    chat_template: str | None = Field(None, description="Name of a built-in chat template, or a Jinja file.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:0.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Type that is computed in; auto is bfloat16 where the processor has it."
    )
    quantization: Literal["8bit", "4bit"] | None = Field(None, description="Load the base smaller (QLoRA); needs CUDA.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")


class MethodOptions(BaseModel):
    """What of the model learns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["lora", "full"] = Field("lora", description="Train an adapter, or the model itself.")
    rank: int = Field(8, ge=1, description="Rank of the adapter.")
    alpha: float = Field(16.0, gt=0, description="The adapter's strength: what it adds is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapter.")
    targets: Annotated[list[str], Flag("target")] = Field(
        [],
        description="Layer that gets an adapter, such as q_proj; repeat. Left out: all linear layers but the output.",
    )
    rslora: bool = Field(False, description="Scale by alpha / √rank, for high ranks.")
    dora: bool = Field(False, description="Train each weight's size beside its direction.")
    pissa: bool = Field(False, description="Begin with the principal singular vectors; saved at twice the rank.")
    save_modules: Annotated[list[str], Flag("save-module")] = Field(
        [], description="Module trained whole and saved with the adapter, such as embed_tokens or lm_head; repeat."
    )
    new_tokens_from: int | None = Field(None, ge=0, description="Train the embeddings of tokens from this id on.")
    trainable: list[str] = Field(
        [], description="With --method full: train only parameters with this in their name; repeat for several."
    )


class OptimisationOptions(BaseModel):
    """How it learns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: float | None = Field(
        None, gt=0, description="Left out: 0.0002 for an adapter, 0.00002 in full, 0.00005 for preferences."
    )
    schedule: Schedule = Field("cosine", description="How the learning rate falls after the warm-up.")
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Longest gradient; 0 does not clip.")
    batch_size: int = Field(4, ge=1, description="Rows that are computed at once.")
    accumulation: int = Field(1, ge=1, description="Batches in a step.")
    epochs: float = Field(1.0, gt=0, description="How often the data is seen.")
    max_steps: int | None = Field(None, ge=1, description="Steps, whatever the epochs say.")
    packing: bool = Field(False, description="Put several examples in one row; none sees another.")
    neftune: float | None = Field(None, gt=0, description="Strength of noise on the embeddings (NEFTune).")
    checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="Compute activations twice to save memory; auto does where they would not fit."
    )
    compile: bool = Field(
        False, description="Compile the model; worth it from about ten minutes on. Needs a C++ compiler."
    )
    seed: int = Field(0, ge=0, description="Decides order, noise and the adapter's first values.")


class ProcessOptions(BaseModel):
    """How many processes train, and what they share out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int | None = Field(
        None, ge=1, description="Processes to train in on this machine; torchrun starts them on several."
    )
    deepspeed: str | None = Field(
        None, description="Share out with DeepSpeed: zero2, zero3, or a JSON file of its options."
    )
    fsdp: bool = Field(False, description="Share out parameters, gradients and optimiser with FSDP2.")


class RecordOptions(BaseModel):
    """What is measured, kept and shown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    eval_datasets: Annotated[list[str], Flag("eval-dataset")] = Field(
        [], description="File or folder to measure on; repeat for several."
    )
    eval_share: float = Field(0.0, ge=0, lt=1, description="Share of the examples that is kept for measuring.")
    eval_every: int | None = Field(None, ge=1, description="Steps between measurements; left out: before and after.")
    patience: int | None = Field(None, ge=1, description="Stop after this many measurements without improvement.")
    samples: int = Field(3, ge=0, description="Answers to write before and after training.")
    save_every: int = Field(200, ge=1, description="Steps between checkpoints.")
    keep: int = Field(2, ge=2, description="Checkpoints to keep.")
    report_to: list[str] = Field(
        [], description="Also report to tensorboard, wandb or mlflow, where installed; repeat."
    )


class PreferenceOptions(BaseModel):
    """What is learnt from preferences, and how strongly."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Literal["dpo", "kto"] = Field(
        "dpo", description="dpo learns from pairs of answers; kto from answers that are good or bad each."
    )
    beta: float = Field(0.1, gt=0, description="How dear it is to move away from what the model was.")
    good_weight: float = Field(1.0, gt=0, description="With --loss kto: how much good answers count.")
    bad_weight: float = Field(1.0, gt=0, description="With --loss kto: how much bad answers count.")


HEADINGS: Mapping[str, type[BaseModel]] = {
    "Preference options": PreferenceOptions,
    "Data options": DataOptions,
    "Model options": SubjectOptions,
    "Method options": MethodOptions,
    "Optimisation options": OptimisationOptions,
    "Process options": ProcessOptions,
    "Record options": RecordOptions,
}
"""What the flags are listed under."""


class CheckOptions(DataOptions, SubjectOptions):
    """What decides how data becomes tokens."""


class Recipe(DataOptions, SubjectOptions, MethodOptions, OptimisationOptions, ProcessOptions, RecordOptions):
    """Everything that decides a run."""

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        """Options that have no effect together are refused, not ignored."""
        if self.method == "full":
            for name in ("adapter", "dora", "rslora", "pissa", "targets", "save_modules", "quantization"):
                if getattr(self, name):
                    raise ValueError(f"'{name}' belongs to --method lora")
        elif self.trainable:
            raise ValueError("'trainable' belongs to --method full")
        if self.adapter and (self.pissa or self.dora or self.rslora or self.targets or self.save_modules):
            raise ValueError("an adapter that goes on training keeps its own settings")
        if self.pissa and (self.dora or self.rslora or self.quantization or self.weight_decay):
            raise ValueError("'pissa' goes with none of 'dora', 'rslora', 'quantization' and 'weight_decay'")
        if self.patience is not None and self.eval_every is None:
            raise ValueError("'patience' needs 'eval_every'")
        if self.fsdp and self.deepspeed:
            raise ValueError("'fsdp' and 'deepspeed' are two ways of the same")
        if (self.fsdp or self.deepspeed) and (self.compile or self.quantization):
            raise ValueError("'compile' and 'quantization' go with neither 'fsdp' nor 'deepspeed'")
        return self

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or (2e-4 if self.method == "lora" else 2e-5)


class PreferenceRecipe(Recipe, PreferenceOptions):
    """Everything that decides a run on preferences: an adapter learns, in one process, and the model without it is what it
    is measured by."""

    absent: ClassVar[frozenset[str]] = frozenset(
        {"unit", "loss_on", "method", "trainable", "packing", "compile", "processes", "deepspeed", "fsdp"}
    )
    """Fields that are for other training; they have no flag, and only their defaults are taken."""

    @model_validator(mode="after")
    def _agree_on_preferences(self) -> PreferenceRecipe:
        """Raises ValueError for what this training does not do."""
        for name in sorted(self.absent):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"'{name}' is for sft and pretrain")
        if self.loss == "kto" and self.batch_size < 2:
            raise ValueError("'loss' kto needs a 'batch_size' of at least 2: a batch's rows are compared")
        if self.loss == "dpo" and (self.good_weight, self.bad_weight) != (1.0, 1.0):
            raise ValueError("'good_weight' and 'bad_weight' belong to --loss kto")
        return self

    @property
    def rate(self) -> float:
        """The highest learning rate; preferences want a lower one than answers."""
        return self.learning_rate or 5e-5


def read_recipe(file: Path | None, typed: Mapping[str, Any], command: str, kind: type[Recipe] = Recipe) -> Recipe:
    """A recipe from a file, with what was typed over it. Raises UsageError that names the option."""
    values = _read_file(file) if file is not None else {}
    try:
        recipe = read_options(kind, {**values, **typed}, command)
    except UsageError as error:
        raise UsageError(error.message, error.hint.replace("calpaca run ", "calpaca ")) from error
    assert isinstance(recipe, kind)
    return recipe


def _read_file(file: Path) -> dict[str, Any]:
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if file.suffix in {".yaml", ".yml"} else tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"The recipe {file} cannot be read: {error}.", "`calpaca train init` writes one.") from error
    if not isinstance(values, dict):
        raise UsageError(f"The recipe {file} holds no options.", "`calpaca train init` writes one.")
    return values
