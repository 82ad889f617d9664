"""What a LoRA adapter on disk is: kind, rank, what it changes and what it replaces, from its headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calpaca.core.adapters import Adapter
from calpaca.core.errors import AdapterError
from calpaca.core.files import AdapterFiles


@dataclass(frozen=True)
class AdapterCard:
    """`rows` counts the embedding rows that the adapter brings; None where it brings none.

    `ranks` and `alphas` are those of the patterns that deviate from `rank` and `alpha`.
    """

    kind: str
    base: str | None
    rank: int | None
    alpha: float | None
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rows: int | None


def read_adapter_card(folder: Path, config: Mapping[str, Any]) -> AdapterCard:
    """Describe an adapter by its `adapter_config.json` and the header of its weights, where there are any."""
    return AdapterCard(
        kind=_kind(config),
        base=config.get("base_model_name_or_path") or None,
        rank=config.get("r"),
        alpha=config.get("lora_alpha"),
        target_modules=_names(config.get("target_modules")),
        modules_to_save=_names(config.get("modules_to_save")),
        ranks=config.get("rank_pattern") or {},
        alphas=config.get("alpha_pattern") or {},
        rows=_rows(folder),
    )


def _kind(config: Mapping[str, Any]) -> str:
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type"))
    if config.get("use_dora"):
        return "DoRA"
    return "rsLoRA" if config.get("use_rslora") else "LoRA"


def _names(value: Any) -> tuple[str, ...]:
    """A list of modules, or one pattern."""
    return (value,) if isinstance(value, str) else tuple(sorted(value or ()))


def _rows(folder: Path) -> int | None:
    try:
        return Adapter(AdapterFiles(folder.name, folder)).vocabulary_rows
    except (AdapterError, ModuleNotFoundError):  # it has no weights, or ones that need PyTorch
        return None
