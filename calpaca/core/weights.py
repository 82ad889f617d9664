"""Loading weights with transformers: checked files in, a model ready to run out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calpaca.core.adapters import Adapter, apply_adapters, check_adapters
from calpaca.core.checkpoint.lineage import contains
from calpaca.core.errors import CorruptFileError, MissingExtraError, ModelError, UnsupportedError, UsageError
from calpaca.core.files import ModelFiles
from calpaca.core.machine import describe_memory
from calpaca.core.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

log = logging.getLogger("calpaca")

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("8bit", "4bit")


@dataclass(frozen=True)
class LoadedWeights:
    """A model in evaluation mode with its tokenizer; `vocabulary_size` counts embedding rows."""

    model: Any
    tokenizer: Tokenizer
    vocabulary_size: int
    context_length: int
    eos_ids: tuple[int, ...]


def load_weights(files: ModelFiles) -> LoadedWeights:
    """Load base and adapters. Everything that can be checked from file headers is checked first.

    Raises CorruptFileError, AdapterError, UnsupportedError or ModelError.
    """
    spec = files.spec
    device = choose_device(spec.device)
    check_quantization(spec.quantization, device)
    check_weight_files(files.weights)
    config = _read_config(files)
    tokenizer = load_tokenizer(files.tokenizer, trust_remote_code=spec.trust_remote_code)
    adapters = [Adapter(adapter) for adapter in files.adapters]
    if adapters:
        vocabulary = check_adapters(adapters, _parameter_shapes(config, spec.trust_remote_code), len(tokenizer))
        _warn_of_contained(files)
    dtype = choose_dtype(spec.dtype, device, _weights_size(files.weights), config)
    model = _from_pretrained(files, config, device, dtype)
    if adapters:
        model = apply_adapters(model, adapters)
    else:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        check_vocabulary(len(tokenizer), vocabulary)
    return LoadedWeights(
        model=model.eval(),
        tokenizer=tokenizer,
        vocabulary_size=vocabulary,
        context_length=int(config.get_text_config().max_position_embeddings),
        eos_ids=_eos_ids(model, tokenizer),
    )


def _warn_of_contained(files: ModelFiles) -> None:
    for adapter in files.adapters:
        if contains(files.weights, adapter.path):
            log.warning(
                "%s contains adapter %s already: it was merged into it and counts twice now. Leave it out.",
                files.name,
                adapter.name,
            )


def check_vocabulary(tokenizer_size: int, rows: int) -> None:
    """Fewer embedding rows than tokens would make the model fail on the last ones."""
    if tokenizer_size > rows:
        raise ModelError(
            f"The tokenizer has {tokenizer_size} tokens, but the model only {rows} embedding rows.",
            "Name the tokenizer that belongs to the model with --tokenizer.",
        )


def choose_device(device: str) -> str:
    """`auto` is the first CUDA device where there is one. Raises UsageError for a device that is not there."""
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    kind, _, numbers = device.partition(":")
    if kind == "cpu":
        return "cpu"
    if kind != "cuda":
        raise UsageError(f"Unknown device '{device}'.", "Use cpu, cuda, cuda:0 or cuda:0,1.")
    if not torch.cuda.is_available():
        raise UsageError(
            f"Device '{device}' is asked for, but this machine has no usable CUDA device.", "Use --device cpu."
        )
    wanted = [int(number) for number in numbers.split(",")] if numbers else [0]
    missing = [number for number in wanted if number >= torch.cuda.device_count()]
    if missing:
        raise UsageError(f"There is no CUDA device {missing[0]}.", f"This machine has {torch.cuda.device_count()}.")
    return "cuda:" + ",".join(map(str, wanted))


def check_quantization(quantization: str | None, device: str) -> None:
    """Raises UsageError for an unknown one, UnsupportedError where bitsandbytes cannot run it."""
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise UsageError(f"Unknown quantization '{quantization}'.", f"Use one of {', '.join(QUANTIZATIONS)}.")
    if not device.startswith("cuda"):
        raise UnsupportedError(
            f"Quantization {quantization} needs a CUDA device; this model is to run on {device}.",
            "Leave --quantization away, or use a smaller model.",
        )
    try:
        import bitsandbytes  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"Quantization {quantization}", "bitsandbytes", "bitsandbytes") from error


def choose_dtype(dtype: str, device: str, weights_size: int, config: Any) -> torch.dtype:
    """`auto` on CUDA is the checkpoint's own; on a CPU float32 while that fits in half of the free memory, since it is
    exact, else bfloat16. `weights_size` in bytes, as stored."""
    import torch

    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"Unknown dtype '{dtype}'.", f"Use one of {', '.join(DTYPES)}, or auto.")
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if device.startswith("cuda"):
        return stored if stored != torch.float32 else torch.bfloat16
    as_float32 = weights_size * 4 // stored.itemsize
    return torch.float32 if as_float32 <= free_memory() // 2 else torch.bfloat16


def free_memory() -> int:
    """Bytes of main memory that are free or hold only file caches; the whole memory where the system does not say."""
    memory = describe_memory()
    return memory.available or memory.total or 8 << 30


def _weights_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in _weight_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def check_weight_files(folder: Path) -> None:
    """Every safetensors file must be whole: its header readable, its size the one the header states."""
    from safetensors import SafetensorError, safe_open

    files = _weight_files(folder)
    if not files:
        raise ModelError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin).", "Name a model folder.")
    for file in files:
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, framework="numpy") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(
                f"{file} ({file.stat().st_size} bytes) is damaged or truncated: {error}.", "Fetch the file again."
            ) from error


def _read_config(files: ModelFiles) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(files.weights), local_files_only=True, trust_remote_code=files.spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        hint = "Pass --trust-remote-code if you trust its code." if "trust_remote_code" in str(error) else ""
        raise ModelError(
            f"{files.weights} cannot be loaded: {reason}", hint or "Name a Hugging Face model folder."
        ) from error


def _parameter_shapes(config: Any, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the base's parameters, without loading or allocating them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet_transformers():
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}


def _from_pretrained(files: ModelFiles, config: Any, device: str, dtype: torch.dtype) -> Any:
    """Load the base and make sure that nothing was left at random values."""
    import pickle

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"device_map": _device_map(device)} if device != "cpu" else {}
    if device.count(","):
        options["max_memory"] = _max_memory(device)
    if files.spec.quantization is not None:
        options["quantization_config"] = _quantization_config(files.spec.quantization)
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(files.weights), config=config, dtype=dtype, local_files_only=True, output_loading_info=True,
                trust_remote_code=files.spec.trust_remote_code, **options,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ModelError(f"{files.weights} cannot be loaded: {reason}", _loading_hint(reason)) from error
    incomplete = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if incomplete:
        raise CorruptFileError(
            f"{files.weights} lacks {len(incomplete)} tensors of the model, or has them in another shape"
            f" (for example {incomplete[0]}).",
            "Fetch all of its files again.",
        )
    return model


def _loading_hint(reason: str) -> str:
    if "memory" in reason:
        return "Use --dtype bfloat16 or a smaller model."
    if "weights_only" in reason or "Unsupported" in reason or "pickle" in reason.lower():
        return "The file holds code instead of tensors and was not run; take a safetensors version."
    return "Fetch its files again."


def _device_map(device: str) -> Any:
    return "auto" if "," in device else {"": device}


def _max_memory(device: str) -> dict[int, int]:
    """Only the CUDA devices that were asked for, with what is free on them, in bytes."""
    import torch

    numbers = [int(number) for number in device.partition(":")[2].split(",")]
    return {number: int(torch.cuda.mem_get_info(number)[0] * 0.9) for number in numbers}


def _quantization_config(quantization: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _eos_ids(model: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer: those of the generation config, the config and the tokenizer."""
    declared: list[Any] = [model.generation_config.eos_token_id, model.config.eos_token_id]
    declared.append(tokenizer.token_id(tokenizer.special_tokens.get("eos_token", "")))
    flat = [index for value in declared for index in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(int(index) for index in flat if index is not None))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own messages off the screen: what matters is raised by us; bars only on a terminal."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
