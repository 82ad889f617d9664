"""Trained weights on disk: written whole, opened again and compared, with the record of what they were trained on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calpaca.core.adapters import Adapter, check_adapters
from calpaca.core.checkpoint.lineage import input_of, tensor_records, versions
from calpaca.core.checkpoint.manifest import MANIFEST, FileRecord, Lineage, Manifest
from calpaca.core.checkpoint.reader import open_checkpoint
from calpaca.core.convert.tokenizer_files import HF_FILES, MODEL_FILE
from calpaca.core.disk import check_space, disk_errors
from calpaca.core.files import AdapterFiles
from calpaca.core.fingerprint import file_digest
from calpaca.core.paths import atomic_file
from calpaca_trainer.errors import TrainingError
from calpaca_trainer.learner import Learner, load_adapter_state
from calpaca_trainer.prompting import Prompting

if TYPE_CHECKING:
    import torch

_COMPLETE = "complete.json"
_ADAPTER, _MODEL = "adapter_model.safetensors", "model.safetensors"
_ELSEWHERE = "or name another --output; the last whole checkpoint is kept"


@dataclass(frozen=True)
class Saver:
    """Saves what a learner has learnt. `settings` are recorded with it; `base` is what a person calls its base."""

    learner: Learner
    base: str
    settings: Mapping[str, Any]

    def save(self, folder: Path, state: Mapping[str, Any] | None = None, *, final: bool = False) -> None:
        """Write weights, tokenizer, template and manifest into a folder, and compare what is there then.

        A full model is kept in float32 until it is `final`. Raises TrainingError for weights that are missing or no
        numbers, before and after writing, and DownloadError when the disk is full; nothing is left then.
        """
        tensors = self._tensors(state, final)
        check_tensors(tensors)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        name = f"What {self.base} has learnt"
        with disk_errors(folder, name, size, _ELSEWHERE):
            check_space(folder, size, name, _ELSEWHERE)
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / (_ADAPTER if self.learner.is_adapter else _MODEL)
            try:
                self._write(folder, file, tensors)
                compare(file, tensors)
                self._check_binding(folder)
            except BaseException:
                file.unlink(missing_ok=True)
                raise
            write_tokenizer(self.learner.prompting, folder)
            self._write_manifest(folder, file)

    def _tensors(self, state: Mapping[str, Any] | None, final: bool) -> dict[str, torch.Tensor]:
        """What is saved, by name."""
        model = self.learner.model
        if self.learner.is_adapter:
            from peft import get_peft_model_state_dict

            found = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
            return {name: tensor.detach().contiguous() for name, tensor in found.items()}
        tied = model.config.tie_word_embeddings
        dtype = self.learner.stored
        return {
            name: tensor.detach().to(dtype) if final else tensor.detach()
            for name, tensor in (state or model.state_dict()).items()
            if not (tied and name == "lm_head.weight")
        }

    def _write(self, folder: Path, file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
        model = self.learner.model
        if self.learner.is_adapter:
            from copy import copy

            config = copy(model.peft_config["default"])
            config.inference_mode, config.base_model_name_or_path = True, self.base
            config.save_pretrained(str(folder))
            return
        config = model.config.to_dict() | {"dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        model.generation_config.save_pretrained(str(folder))

    def _check_binding(self, folder: Path) -> None:
        """A saved adapter must fit its base, as it will be asked to when it is used. Raises AdapterError."""
        if not self.learner.is_adapter:
            return
        stored = open_checkpoint(self.learner.files.weights).tensors
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        adapter = Adapter(AdapterFiles(folder.name, folder))
        check_adapters([adapter], shapes, len(self.learner.prompting.tokenizer))

    def _write_manifest(self, folder: Path, file: Path) -> None:
        files = self.learner.files
        base = replace(input_of("base", files.name, files.weights), name=self.base)
        lineage = Lineage("train", (base,), self.settings, self.learner.prompting.template_digest, versions())
        record = FileRecord(file.stat().st_size, file_digest(file, use_memo=False))
        manifest = Manifest(lineage, {file.name: record}, tensor_records(open_checkpoint(file)))
        with atomic_file(folder / MANIFEST) as part:
            part.write_text(manifest.to_json(), "utf-8")


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise TrainingError for weights that must not become a file."""
    import torch

    if not tensors:
        raise TrainingError("There is nothing to save: no tensor is trained.", "Check --target and --save-module.")
    for name, tensor in tensors.items():
        if not tensor.numel() or not bool(torch.isfinite(tensor).all()):
            what = "is empty" if not tensor.numel() else "holds NaN or infinite values"
            raise TrainingError(f"{name} {what}; nothing is written.", "Lower --learning-rate and start again.")


def compare(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Open a file again: it must hold the same tensors, each with the same norm. Raises TrainingError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            norms = {name: _norm(opened.get_tensor(name)) for name in names & tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{file} cannot be opened again: {error}.", "Check the disk.") from error
    if names != tensors.keys():
        raise TrainingError(f"{file} holds {len(names)} tensors, {len(tensors)} were written.", "Check the disk.")
    for name, norm in norms.items():
        if not math.isclose(norm, _norm(tensors[name]), rel_tol=1e-9):
            raise TrainingError(f"{file} holds {name} with the norm {norm:g}, not the one written.", "Check the disk.")


def _norm(tensor: torch.Tensor) -> float:
    return float(tensor.double().norm())


def check_effect(weights: Mapping[str, torch.Tensor], before: Mapping[str, float]) -> None:
    """Raise TrainingError when training left every weight as it was. `before` are the norms it began with."""
    if norms({name: weights[name] for name in before}) == before:
        raise TrainingError(
            "Training changed no weight: the result would be the base.", "Raise --learning-rate or --max-steps."
        )


def norms(weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The norm of every tensor."""
    return {name: _norm(tensor.detach()) for name, tensor in weights.items()}


def write_tokenizer(prompting: Prompting, folder: Path) -> None:
    """The tokenizer's files as they are, and the template that was trained with."""
    for name in (*HF_FILES, MODEL_FILE):
        if (prompting.folder / name).is_file():
            shutil.copyfile(prompting.folder / name, folder / name)
    (folder / "chat_template.jinja").write_text(prompting.template.source, "utf-8")


# Checkpoints ---------------------------------------------------------------------------------------------------------


def mark_complete(checkpoint: Path) -> None:
    """Say that a checkpoint is whole: the sizes of all its files, written last."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != _COMPLETE]
    sizes = {file.relative_to(checkpoint).as_posix(): file.stat().st_size for file in files}
    part = checkpoint / f".{_COMPLETE}.part"
    part.write_text(json.dumps(sizes, indent=1), "utf-8")
    part.replace(checkpoint / _COMPLETE)


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run that is whole; None when there is none."""
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda each: int(each.name.rpartition("-")[2]), reverse=True)
    return next(filter(_is_whole, numbered), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((checkpoint / _COMPLETE).read_text("utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def restore(model: Any, folder: Path) -> None:
    """Give a model the trained weights of a checkpoint. Raises TrainingError when they do not fit."""
    from safetensors.torch import load_file

    if hasattr(model, "peft_config"):
        load_adapter_state(model, load_file(folder / _ADAPTER))
        return
    missing, unexpected = model.load_state_dict(load_file(folder / _MODEL), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise TrainingError(f"{folder} is a checkpoint of another model.", "Start again with another --output.")
