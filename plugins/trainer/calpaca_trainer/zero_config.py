"""DeepSpeed's options: made here, or read from a person's JSON file and compared with the recipe.

Source of the format: https://www.deepspeed.ai/docs/config-json/. Left at "auto" are the values that transformers fills in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from calpaca.core.errors import UnsupportedError, UsageError, nearest
from calpaca_trainer.recipe import Recipe

_STAGES = {"zero2": 2, "zero3": 3}
_SECTIONS = {
    "activation_checkpointing", "aio", "autotuning", "comet", "comms_logger", "compile", "compression_training",
    "csv_monitor", "elasticity", "flops_profiler", "tensorboard", "wandb", "zero_optimization",
}  # fmt: skip
"""Sections that DeepSpeed reads elsewhere than in its runtime."""
_HINT = 'Set it to "auto", or the option to this value.'


def read_zero_config(recipe: Recipe, processes: int, dtype: str) -> dict[str, Any]:
    """The options for a run in so many processes, complete. `dtype` is what is computed in.

    Raises UsageError for a file that cannot be read, that DeepSpeed does not understand or that says another thing than
    the recipe, and UnsupportedError for what cannot be done.
    """
    wanted = recipe.deepspeed or ""
    if find_spec("deepspeed") is None:
        raise UnsupportedError(
            "--deepspeed needs DeepSpeed, which is not installed.",
            "Install it with: DS_BUILD_OPS=0 pip install 'calpaca-trainer[deepspeed]'",
        )
    place = "DeepSpeed's options" if wanted in _STAGES else wanted
    config = _make(_STAGES[wanted]) if wanted in _STAGES else _read(Path(wanted))
    _check_names(config, place)
    _check_agreement(config, _said_in_recipe(recipe, processes), place)
    _check_types(config, dtype, place)
    config.pop("fp16", None)  # not in use, and DeepSpeed refuses values in it that it took once
    _check_with_deepspeed({**config, **_batches(recipe, 1)}, place)  # it does not know of the others yet
    return config


def _make(stage: int) -> dict[str, Any]:
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    zero = {"stage": stage, "contiguous_gradients": True, "overlap_comm": False}
    return {"zero_optimization": zero, **dict.fromkeys(automatic, "auto")}


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--deepspeed is {file}, which cannot be read: {error}.", "Give zero2, zero3 or a JSON file."
        ) from error
    except ValueError as error:
        raise UsageError(f"{file} is no JSON: {error}.", "Correct it there.") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization"), dict):
        raise UsageError(f"{file} has no section zero_optimization.", 'It needs {"zero_optimization": {"stage": 2}}.')
    return config


def _check_names(config: Mapping[str, Any], place: str) -> None:
    """DeepSpeed passes over a misspelt name at the top without a word. Raises UsageError."""
    from deepspeed.runtime import config as options

    known = _SECTIONS | {value for name, value in vars(options).items() if name.isupper() and isinstance(value, str)}
    for name in config:
        if name not in known:
            match = nearest(name, known)
            hint = f"Did you mean '{match}'?" if match else "Remove it."
            raise UsageError(f"{place} has an option '{name}', which DeepSpeed does not know.", hint)


def _batches(recipe: Recipe, processes: int) -> dict[str, int]:
    rows = recipe.batch_size * recipe.accumulation * processes
    return {
        "train_micro_batch_size_per_gpu": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "train_batch_size": rows,
    }


def _said_in_recipe(recipe: Recipe, processes: int) -> dict[str, float]:
    """What the recipe decides, by DeepSpeed's names."""
    return _batches(recipe, processes) | {
        "gradient_clipping": recipe.max_grad_norm,
        "optimizer.params.lr": recipe.rate,
        "optimizer.params.weight_decay": recipe.weight_decay,
    }


def _check_agreement(config: Mapping[str, Any], said: Mapping[str, float], place: str) -> None:
    for name, value in said.items():
        given = _at(config, name)
        if given not in (None, "auto", value):
            raise UsageError(f"{place} sets {name} to {given}, and the recipe to {value}.", _HINT)
    if "scheduler" in config:
        raise UsageError(f"{place} has a scheduler of its own.", "Remove it: the learning rate follows --schedule.")


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _check_types(config: Mapping[str, Any], dtype: str, place: str) -> None:
    if _at(config, "fp16.enabled") is True:
        raise UnsupportedError(
            f"{place} asks for fp16, whose range is too small for training without care.",
            'Set "enabled" of "fp16" to "auto"; --dtype bfloat16 is as small.',
        )
    if _at(config, "bf16.enabled") is True and dtype != "bfloat16":
        raise UsageError(f"{place} asks for bf16, and --dtype is {dtype}.", 'Set "enabled" of "bf16" to "auto".')


def _check_with_deepspeed(config: dict[str, Any], place: str) -> None:
    """What DeepSpeed itself finds wrong."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    try:
        zero = DeepSpeedConfig(config).zero_config
    except ValidationError as error:
        raise UsageError(f"{place} is not what DeepSpeed takes: {'; '.join(_faults(error))}.", "Correct it.") from error
    except (ValueError, AssertionError, TypeError, KeyError) as error:
        raise UsageError(f"{place} is not what DeepSpeed takes: {error}.", "Correct it there.") from error
    if not zero.stage:
        raise UsageError(f"{place} has ZeRO stage 0, which shares nothing out.", "Set stage to 1, 2 or 3.")


def _faults(error: Any) -> Iterator[str]:
    for fault in error.errors():
        yield f"{'.'.join(map(str, fault['loc'])) or error.title}: {fault['msg']}"
