"""What a folder or file of weights is, whatever form it has, and what can be made of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calpaca.core.errors import ModelNotFoundError, UnsupportedError

Kind = Literal["pth", "safetensors", "bin", "gguf"]

PARAMS = "params.json"
_PART = re.compile(r"consolidated\.(\d+)\.pth")


@dataclass(frozen=True)
class Source:
    """Weights on this machine: a `.gguf` file, or a folder of one of the other kinds."""

    path: Path
    kind: Kind

    def __str__(self) -> str:
        """What it is, in words."""
        if self.kind == "gguf":
            return f"{self.path} is a GGUF file"
        if self.kind == "pth":
            parts = len(part_files(self.path))
            return f"{self.path} is an original LLaMA checkpoint in {parts} part{'s' * (parts > 1)} (.pth)"
        container = "safetensors" if self.kind == "safetensors" else "pytorch_model.bin"
        return f"{self.path} is a Hugging Face folder ({container})"


def identify(path: Path) -> Source:
    """What lies at `path`. Raises ModelNotFoundError or UnsupportedError that says what it is instead of a model."""
    if path.is_file():
        return _identify_file(path)
    if not path.is_dir():
        raise ModelNotFoundError(f"{path} does not exist.", "Check the path.")
    if (path / "adapter_config.json").is_file():
        raise UnsupportedError(
            f"{path} is a LoRA adapter, no model.",
            f"Merge it into its base: calpaca models merge BASE --adapter {path} --output DIR",
        )
    if (path / "config.json").is_file():
        if any(path.glob("*.safetensors")):
            return Source(path, "safetensors")
        if any(path.glob("pytorch_model*.bin")):
            return Source(path, "bin")
    if part_files(path):
        return Source(path, "pth")
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return Source(files[0], "gguf")
    raise ModelNotFoundError(f"{path} holds no model that can be converted.", _hint(path))


def part_files(folder: Path) -> list[Path]:
    """The parts of an original checkpoint, in order; none when `folder` is no such checkpoint."""
    return sorted((file for file in folder.glob("consolidated.*.pth") if _PART.fullmatch(file.name)), key=part_number)


def part_number(file: Path) -> int:
    match = _PART.fullmatch(file.name)
    assert match is not None
    return int(match[1])


def is_original(path: Path) -> bool:
    """Whether a folder is an original checkpoint and nothing else."""
    return path.is_dir() and not (path / "config.json").is_file() and bool(part_files(path))


def _identify_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        return Source(path, "gguf")
    if path in part_files(path.parent):
        return Source(path.parent, "pth")
    raise UnsupportedError(
        f"{path} is one file of a model.", f"Name the folder that it lies in, with its configuration: {path.parent}"
    )


def _hint(path: Path) -> str:
    below = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and part_files(folder)]
    if below:
        return f"Name a folder in it: {', '.join(folder.name for folder in below)}."
    if (path / PARAMS).is_file():
        return "There is a params.json, but no consolidated.00.pth beside it: fetch the parts."
    if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return "There are Hugging Face weights, but no config.json beside them: fetch it."
    return "Name a folder with config.json and weights, or with params.json and consolidated.NN.pth, or a .gguf file."
