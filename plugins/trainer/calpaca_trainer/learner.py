"""The model that learns: its base loaded, and what of it is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calpaca.core.adapters import Adapter, check_adapters, places_without_values
from calpaca.core.errors import AdapterError, UsageError
from calpaca.core.files import ModelFiles
from calpaca.core.machine import describe_processor
from calpaca.core.merge.order import lineage_problems
from calpaca.core.weights import check_quantization, check_vocabulary, choose_device, load_weights
from calpaca_trainer.elementwise import Elementwise, compiled
from calpaca_trainer.fused_layer import fuse
from calpaca_trainer.labelled_loss import attach_loss
from calpaca_trainer.prompting import Prompting
from calpaca_trainer.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

log = logging.getLogger("calpaca")

_ADAPTER = "default"  # PEFT's name for the one adapter of a model


@dataclass(frozen=True)
class Learner:
    """`model` is in training mode; `stored` is the dtype its base lies in. `mixed` says that it is computed in
    bfloat16 while what is trained is kept in float32."""

    model: Any
    files: ModelFiles
    prompting: Prompting
    device: str
    stored: torch.dtype
    mixed: bool
    length_step: int = 8
    """What lengths are rounded up to a multiple of: layers that are compiled whole are compiled for each anew."""

    @property
    def is_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def causal(self) -> Any:
        """The causal language model under the adapter."""
        return self.model.get_base_model() if self.is_adapter else self.model

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that learn, by name."""
        return ((name, each) for name, each in self.model.named_parameters() if each.requires_grad)


def load_learner(recipe: Recipe, files: ModelFiles, prompting: Prompting) -> Learner:
    """Load the base and choose what of it learns. Everything that can be checked from headers is checked first.

    Raises UsageError, AdapterError, UnsupportedError, CorruptFileError or ModelError.
    """
    import torch

    torch.manual_seed(recipe.seed)
    device = choose_device(recipe.device)
    check_quantization(recipe.quantization, device)
    adapters = [Adapter(adapter) for adapter in files.adapters]
    for problem in lineage_problems(files, adapters, None) if adapters else ():
        raise problem
    dtype = choose_training_dtype(recipe, device)
    model, stored = _load_base(files, device, "float32" if recipe.method == "full" else dtype)
    model.config.use_cache = False
    if adapters:
        model = _with_adapter(model, adapters[0], len(prompting.tokenizer))
    else:
        check_vocabulary(len(prompting.tokenizer), model.get_input_embeddings().weight.shape[0])
        model = _with_new_adapter(model, recipe) if recipe.method == "lora" else _in_full(model, recipe.trainable)
    mixed = dtype == "bfloat16" and _widen(model)
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    attach_loss(causal)
    if recipe.compile:
        _check_compiler()
    # Where the model is shared out, what gathers a weight hangs on the module that it belongs to: each must be called.
    may_fuse = recipe.method == "lora" and not (recipe.fsdp or recipe.deepspeed)
    fused = may_fuse and fuse(causal, compiled() if recipe.compile else Elementwise())
    whole_layers = recipe.compile and not fused
    if whole_layers:
        _compile(causal)
    return Learner(model.train(), files, prompting, device, stored, mixed, 64 if whole_layers else 8)


def choose_training_dtype(recipe: Recipe, device: str) -> str:
    """`auto` is bfloat16 on CUDA and on processors that compute in it, else float32."""
    if recipe.dtype != "auto":
        return recipe.dtype
    has_it = {"AVX-512 BF16", "AMX BF16", "BF16"} & set(describe_processor().instruction_sets)
    return "bfloat16" if device.startswith("cuda") or has_it else "float32"


def _check_compiler() -> None:
    import shutil

    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UsageError("--compile needs a C++ compiler, and there is none.", "Install g++, or leave it out.")


def _compile(causal: Any) -> None:
    """Compile the layers: they share one code, so this takes a fraction of compiling the whole."""
    for layer in getattr(causal, causal.base_model_prefix).layers:
        layer.compile()


def _load_base(files: ModelFiles, device: str, dtype: str) -> tuple[Any, torch.dtype]:
    """The base alone, and the dtype that it is stored in."""
    import torch
    from transformers import AutoConfig

    spec = files.spec.model_copy(update={"adapters": (), "dtype": dtype, "device": device, "engine": "transformers"})
    # With its own tokenizer: whether another one fits is only known when the adapter is on it.
    loaded = load_weights(replace(files, spec=spec, adapters=(), tokenizer=files.weights))
    stored = AutoConfig.from_pretrained(str(files.weights), local_files_only=True).dtype
    return loaded.model, stored if isinstance(stored, torch.dtype) else torch.float32


# Adapters ------------------------------------------------------------------------------------------------------------


def _with_new_adapter(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig

    rank = recipe.rank * 2 if recipe.pissa else recipe.rank  # half of it is what the base has already, taken away
    config = LoraConfig(
        r=rank, lora_alpha=recipe.alpha * rank / recipe.rank, lora_dropout=recipe.dropout, bias="none",
        target_modules=recipe.targets or _linear_layers(model), use_rslora=recipe.rslora, use_dora=recipe.dora,
        modules_to_save=recipe.save_modules or None, task_type="CAUSAL_LM",
        trainable_token_indices=_new_tokens(model, recipe.new_tokens_from),
    )  # fmt: skip
    try:
        adapted = _adapted(_prepared(model, recipe.quantization), config)
    except ValueError as error:
        raise UsageError(
            f"The adapter cannot be put on the model: {error}",
            f"Its linear layers: {', '.join(_linear_layers(model))}.",
        ) from error
    if recipe.pissa:
        from calpaca_trainer.pissa import initialise

        initialise(adapted, recipe.rank)
    return adapted


def _adapted(model: Any, config: Any) -> Any:
    """The model with an adapter. PEFT warns of tied embeddings of which one end is trained: calpaca saves and loads
    them as what they are then, two."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return PeftModel(model, config, adapter_name=_ADAPTER)


def _prepared(model: Any, quantization: str | None) -> Any:
    if quantization is None:
        return model
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _linear_layers(model: Any) -> list[str]:
    """Last names of all linear layers but the output layer."""
    head = model.get_output_embeddings()
    linear = (name for name, each in model.named_modules() if "Linear" in type(each).__name__ and each is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def _new_tokens(model: Any, first: int | None) -> list[int] | None:
    """The ids of the tokens whose embeddings are trained."""
    if first is None:
        return None
    rows = model.get_input_embeddings().weight.shape[0]
    if first >= rows:
        raise UsageError(f"--new-tokens-from is {first}, but the model has {rows} tokens.", "Give the first new id.")
    return list(range(first, rows))


def _with_adapter(model: Any, adapter: Adapter, tokenizer_size: int) -> Any:
    """An adapter that goes on learning; the base gets its number of tokens. Raises AdapterError."""
    from peft import LoraConfig

    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    check_adapters([adapter], shapes, tokenizer_size)
    rows = adapter.vocabulary_rows
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    config = LoraConfig.from_pretrained(str(adapter.files.path))
    config.inference_mode = False
    adapted = _adapted(model, config)
    load_adapter_state(adapted, {f"base_model.model.{name}": tensor for name, tensor in adapter.tensors().items()})
    return adapted


def load_adapter_state(model: Any, state: dict[str, Any]) -> None:
    """Give an adapter its values, by PEFT's names; every one must find its place and every place its value."""
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(model, state, adapter_name=_ADAPTER)
    empty = places_without_values(model, result.missing_keys, _ADAPTER)
    if result.unexpected_keys or empty:
        example = [*result.unexpected_keys, *empty][0]
        raise AdapterError(
            f"{len(result.unexpected_keys)} of {len(state)} tensors of the adapter found no place and {len(empty)} places"
            f" got none (for example {example}).",
            "Take the adapter_config.json that was saved with these weights.",
        )


# In full -------------------------------------------------------------------------------------------------------------


def _in_full(model: Any, trainable: Sequence[str]) -> Any:
    """All parameters learn, or those whose names hold one of the given texts. Raises UsageError when none does."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not trainable or any(text in name for text in trainable))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        names = ", ".join(name for name, _ in list(model.named_parameters())[:4])
        raise UsageError(f"No parameter's name holds {' or '.join(trainable)}.", f"They are called {names}, …")
    return model


def _widen(model: Any) -> bool:
    """Keep in float32 what learns: small steps would be lost in bfloat16. Whether the model must then be computed in
    mixed types, as whole layers that learn and are not in bfloat16 meet others that are."""
    import torch

    whole = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
            whole = whole or ".lora_" not in name
    return whole
