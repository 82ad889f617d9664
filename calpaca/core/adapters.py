"""LoRA adapters: checked against the base before they are put on it, and applied in order without merging.

Low-rank deltas of several adapters add up. Whole tensors that an adapter carries (`embed_tokens` and `lm_head` with a
longer vocabulary) replace the base's; of several, the last one's stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calpaca.core.checkpoint.reader import Checkpoint, open_checkpoint
from calpaca.core.errors import AdapterError, UnsupportedError
from calpaca.core.files import AdapterFiles
from calpaca.core.initialisation import check_initialisation
from calpaca.core.tokenizer import has_tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

HEAD = "lm_head.weight"
"""The output layer, which may be tied to the input embeddings and then is not stored."""

_PREFIX = re.compile(r"^base_model\.model\.")
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)\.(?!weight$|bias$)\w+"
)
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.\w+)?|token_adapter\.base_layer)\.(weight|bias)$")
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(\.weight)?$")
_VOCABULARY = re.compile(r"(^|\.)(embed_tokens|lm_head)\.weight$")
_ADDITIONS = (".lora_", ".trainable_tokens_")  # parts of names that change a weight instead of replacing it


@dataclass(frozen=True)
class Adapter:
    """An adapter's configuration and tensors, read from its folder when asked for."""

    files: AdapterFiles

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`adapter_config.json`. Raises AdapterError when it is missing, damaged or not LoRA."""
        path = self.files.path / "adapter_config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise AdapterError(f"{self.files.path} holds no adapter_config.json.", "Name an adapter folder.") from None
        except ValueError as error:
            raise AdapterError(f"{path} is no valid JSON: {error}.", "Fetch the adapter again.") from error
        kind = config.get("peft_type") if isinstance(config, dict) else None
        if kind != "LORA":
            raise UnsupportedError(f"Adapter {self.files.name} is of type {kind}.", "LoRA adapters are supported.")
        _check_numbers(path, config)
        return config

    @cached_property
    def weights(self) -> Path:
        for name in ("adapter_model.safetensors", "adapter_model.bin"):
            if (self.files.path / name).is_file():
                return self.files.path / name
        raise AdapterError(
            f"{self.files.path} holds no adapter_model.safetensors or adapter_model.bin.", "Fetch the adapter again."
        )

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors in the file, by the names they have there. Raises CorruptFileError when it is damaged."""
        return open_checkpoint(self.weights)

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """Name of every tensor in the base model: its name in the file.

        Every version of PEFT's names is understood. Of a module that was trained whole and lies in the file more than
        once, the trained one is taken. Raises AdapterError for two tensors that claim one place.
        """
        keys: dict[str, str] = {}
        for key in sorted(self.checkpoint.tensors, key=_certainty):
            name = own_name(key)
            if name not in keys:
                keys[name] = key
            elif _certainty(key) == _certainty(keys[name]):
                raise AdapterError(
                    f"{self.weights} holds two tensors for {name}: {keys[name]} and {key}.",
                    "Save each adapter to a folder of its own.",
                )
        return keys

    @cached_property
    def shapes(self) -> Shapes:
        """Shape of every tensor, by its name in the base model."""
        return {name: self.checkpoint.tensors[key].shape for name, key in self.keys.items()}

    @property
    def replaced(self) -> Shapes:
        """Those tensors that take the place of the base's, whole."""
        return {name: shape for name, shape in self.shapes.items() if is_replacement(name)}

    def read(self, name: str) -> Tensor:
        """The tensor with this name in the base model, on the CPU."""
        return self.checkpoint.read(self.keys[name])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, on the CPU, by their names in the base model."""
        return {name: self.read(name) for name in self.keys}

    @cached_property
    def vocabulary_rows(self) -> int | None:
        """Rows of the embeddings that the adapter carries, None when it carries none."""
        rows = [shape[0] for name, shape in self.shapes.items() if _VOCABULARY.search(name)]
        return max(rows) if rows else None

    @property
    def vocabulary(self) -> int | None:
        """Tokens that it was trained with, as far as its embeddings or its tokenizer tell."""
        return self.vocabulary_rows or self.tokenizer_size

    @cached_property
    def tokenizer_size(self) -> int | None:
        return len(load_tokenizer(self.files.path)) if has_tokenizer(self.files.path) else None


def _check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    """Ranks and alphas must be there, be numbers, and belong to patterns that can be matched."""
    hint = "Take the file that was saved with the adapter."
    for key, meaning in (("r", "rank"), ("lora_alpha", "alpha")):
        if not isinstance(config.get(key), int | float):
            raise AdapterError(f"{path} states no {meaning} ('{key}').", hint)
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    for rank in (config["r"], *ranks.values()):
        if not isinstance(rank, int) or rank < 1:
            raise AdapterError(f"{path} states the rank {rank!r}.", hint)
    for pattern in (*ranks, *alphas):
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(f"{path} has the pattern {pattern!r}, which cannot be read: {error}.", hint) from error


def own_name(key: str) -> str:
    """A tensor's name as the base model would call it, without prefixes, wrappers and the adapter's own name."""
    name = _NAMED.sub(r".\1", _PREFIX.sub("", key))
    name = name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name
    return _WRAPPED.sub(r".\3", name).replace(".original_module.", ".")


def is_replacement(name: str) -> bool:
    """Whether a tensor of this name takes the place of the base's; the others add to it, or change some rows."""
    return not any(part in name for part in _ADDITIONS)


def _certainty(key: str) -> tuple[bool, bool]:
    """Sorts the tensor that PEFT loads before the copies that it keeps beside it."""
    return ".original_module." in key, ".modules_to_save." in key


def check_adapters(adapters: Sequence[Adapter], base: Shapes, tokenizer_size: int) -> int:
    """Check order, shapes, ranks and vocabulary before anything heavy is loaded; returns the final number of rows.

    `base` maps the names of the base model's parameters to their shapes. Raises AdapterError with the numbers and
    the fix, UnsupportedError for an adapter that was trained on a base that it changed.
    """
    for adapter in adapters:
        check_initialisation(adapter.files.name, adapter.config)
    check_order(adapters)
    shapes = with_head(base)
    for adapter in adapters:
        if not adapter.shapes:
            raise AdapterError(
                f"{adapter.weights} holds no tensors.", "Its training saved nothing; take another checkpoint."
            )
        for name, shape in adapter.replaced.items():
            _check_replacement(adapter, name, shape, shapes)
        shapes = {**shapes, **adapter.replaced}
        for name, shape in adapter.shapes.items():
            if (match := _LORA.match(name)) is not None:
                _check_low_rank(adapter, match["module"], match["part"], shape, shapes)
    rows = next((name for name in base if name.endswith("embed_tokens.weight")), None)
    vocabulary = shapes[rows][0] if rows is not None else 0
    if adapters and tokenizer_size > vocabulary:
        raise AdapterError(
            f"The tokenizer has {tokenizer_size} tokens, but base and adapters together have {vocabulary} embedding"
            " rows: the new tokens have no embeddings.",
            "Use the base's tokenizer with --tokenizer, or the adapter that carries embed_tokens and lm_head.",
        )
    return vocabulary


def check_order(adapters: Sequence[Adapter]) -> None:
    """Raise AdapterError, with the right order, when an adapter with a longer vocabulary stands before one with a
    shorter: it was trained after it."""
    known = [adapter for adapter in adapters if adapter.vocabulary is not None]
    for first, second in pairwise(known):
        if (first.vocabulary or 0) > (second.vocabulary or 0):
            names = [adapters[at].files.name for at in vocabulary_order(adapters)]
            raise AdapterError(
                f"The adapters stand in the wrong order: {first.files.name} has {first.vocabulary} tokens and"
                f" {second.files.name}, after it, only {second.vocabulary}.",
                f"Give them as {' '.join(f'--adapter {name}' for name in names)}.",
            )


def vocabulary_order(adapters: Sequence[Adapter]) -> list[int]:
    """The adapters' positions by length of vocabulary; those that say nothing of theirs keep their places."""
    known = [at for at, adapter in enumerate(adapters) if adapter.vocabulary is not None]
    ordered = iter(sorted(known, key=lambda at: adapters[at].vocabulary or 0))
    return [next(ordered) if at in known else at for at in range(len(adapters))]


def with_head(base: Shapes) -> Shapes:
    """The shapes with the output layer's, also where it is tied to the embeddings and not stored."""
    embedding = next((shape for name, shape in base.items() if name.endswith("embed_tokens.weight")), None)
    return dict(base) if embedding is None or HEAD in base else {**base, HEAD: embedding}


def _check_low_rank(adapter: Adapter, module: str, part: str, shape: tuple[int, ...], base: Shapes) -> None:
    """lora_A is [r, in], lora_B [out, r]; for an embedding lora_embedding_A is [r, rows], B [dimensions, r]."""
    weight = base.get(f"{module}.weight")
    if weight is None:
        raise _other_base(adapter, f"it changes {module}, which the base does not have")
    if len(shape) != 2 or len(weight) != 2:
        raise _other_base(adapter, f"its {module} is {list(shape)}, the base has {list(weight)}")
    rank_first = part.endswith("A")
    rank, size = (shape[0], shape[1]) if rank_first else (shape[1], shape[0])
    if rank not in {adapter.config["r"], *(adapter.config.get("rank_pattern") or {}).values()}:
        raise AdapterError(
            f"Adapter {adapter.files.name}: {module} has rank {rank}, but adapter_config.json says"
            f" r = {adapter.config['r']}.",
            "Take the adapter_config.json that was saved with these weights.",
        )
    wanted = weight[1] if rank_first != part.startswith("embedding") else weight[0]
    if size not in (weight if adapter.config.get("fan_in_fan_out") else {wanted}):
        raise _other_base(adapter, f"its {module} is for size {size}, the base has {wanted}")


def _check_replacement(adapter: Adapter, name: str, shape: tuple[int, ...], base: Shapes) -> None:
    own = base.get(name)
    if own is None:
        raise _other_base(adapter, f"it carries {name}, which the base does not have")
    same = shape[1:] == own[1:] if _VOCABULARY.search(name) else shape == own
    if not same:
        raise _other_base(adapter, f"its {name} is {list(shape)}, the base has {list(own)}")


def _other_base(adapter: Adapter, reason: str) -> AdapterError:
    trained_on = adapter.config.get("base_model_name_or_path")
    origin = f" It was trained on {trained_on}." if trained_on else ""
    return AdapterError(
        f"Adapter {adapter.files.name} was made for another base: {reason}.{origin}",
        "Name the base it was trained on with --model.",
    )


def apply_adapters(model: torch.nn.Module, adapters: Sequence[Adapter]) -> torch.nn.Module:
    """Put checked adapters on a loaded base, all active at once; returns the model to run.

    Raises AdapterError when a tensor finds no place or a place gets no tensor.
    """
    from peft import LoraConfig, PeftModel

    states = [adapter.tensors() for adapter in adapters]
    _replace_tensors(model, adapters, states)
    names = [f"adapter_{position}" for position in range(len(adapters))]
    peft_model: Any = None
    # PEFT wants rows of tokens from every adapter that comes after one with such rows: those come last. Which are active,
    # and in which order, is said below.
    for adapter, name, state in sorted(
        zip(adapters, names, states, strict=True), key=lambda each: _has_token_rows(each[2])
    ):
        if not state:
            continue  # it only replaced whole tensors
        config = LoraConfig.from_pretrained(str(adapter.files.path))
        config.modules_to_save = None  # those are in place already
        config.inference_mode = True
        try:
            if peft_model is None:
                peft_model = PeftModel(model, config, adapter_name=name)
            else:
                peft_model.add_adapter(name, config)
        except ValueError as error:
            raise AdapterError(
                f"Adapter {adapter.files.name} cannot be added: {error}", "Merge the first one."
            ) from error
        _load_state(peft_model, adapter, name, state)
        _scale(peft_model, name, adapter.files.scale)
    if peft_model is None:
        return model
    peft_model.base_model.set_adapter(
        [name for name, state in zip(names, states, strict=True) if state], inference_mode=True
    )
    result: torch.nn.Module = peft_model
    return result


def _has_token_rows(state: Mapping[str, Tensor]) -> bool:
    return any(".trainable_tokens_" in name for name in state)


def _replace_tensors(model: torch.nn.Module, adapters: Sequence[Adapter], states: Sequence[dict[str, Tensor]]) -> None:
    """Take whole tensors out of `states` and put the last one of each name into the model."""
    final: dict[str, tuple[Adapter, Tensor]] = {}
    for adapter, state in zip(adapters, states, strict=True):
        for name in filter(is_replacement, list(state)):
            final[name] = (adapter, state.pop(name))
    for name, (adapter, tensor) in final.items():
        if adapter.files.scale != 1.0:
            raise UnsupportedError(
                f"Adapter {adapter.files.name} replaces {name} and cannot be scaled by {adapter.files.scale:g}.",
                "Use it without a scale.",
            )
        _replace(model, name, tensor, untie=_is_saved_module(adapter, name))


def _is_saved_module(adapter: Adapter, name: str) -> bool:
    """Modules to save stand beside the base's, so a tied weight's other end keeps its own values."""
    module = name.rpartition(".")[0]
    return any(module.endswith(saved) for saved in adapter.config.get("modules_to_save") or ())


def _replace(model: Any, name: str, tensor: Tensor, *, untie: bool) -> None:
    """Give a parameter new values and, for embeddings, a new number of rows."""
    import torch

    module_name, _, kind = name.rpartition(".")
    module = model.get_submodule(module_name)
    old = getattr(module, kind)
    new = torch.nn.Parameter(tensor.to(dtype=old.dtype, device=old.device), requires_grad=False)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    setattr(module, kind, new)
    if tied and not untie and _VOCABULARY.search(name):
        for other in (head, model.get_input_embeddings()):
            _set_rows(other, new)
    elif tied and _VOCABULARY.search(name):
        model.config.tie_word_embeddings = False
    if _VOCABULARY.search(name):
        _set_rows(module, new)
        model.config.vocab_size = tensor.shape[0]


def _set_rows(module: Any, weight: Any) -> None:
    module.weight = weight
    rows = "num_embeddings" if hasattr(module, "num_embeddings") else "out_features"
    setattr(module, rows, weight.shape[0])


def _load_state(peft_model: Any, adapter: Adapter, name: str, state: Mapping[str, Tensor]) -> None:
    """Load low-rank tensors; every one must find its place and every place its tensor."""
    from peft import set_peft_model_state_dict

    prefixed = {f"base_model.model.{key}": tensor for key, tensor in state.items()}
    result = set_peft_model_state_dict(peft_model, prefixed, adapter_name=name)
    unbound = list(result.unexpected_keys)
    empty = places_without_values(peft_model, result.missing_keys, name)
    if unbound or empty:
        example = (unbound or empty)[0]
        raise AdapterError(
            f"Adapter {adapter.files.name}: {len(unbound)} of {len(state)} tensors found no place in the base and"
            f" {len(empty)} places got no tensor (for example {example}).",
            "Name the base it was trained on with --model, or fetch the adapter again.",
        )


def places_without_values(peft_model: Any, missing: Sequence[str], name: str) -> list[str]:
    """Those of the `missing` parameters of the adapter `name` that share their values with none that got some: trained
    tokens of tied embeddings have two names."""
    parameters = dict(peft_model.named_parameters(remove_duplicate=False))
    filled = {id(parameter) for key, parameter in parameters.items() if key not in missing}
    return [key for key in missing if f".{name}" in key and id(parameters.get(key)) not in filled]


def _scale(peft_model: Any, name: str, scale: float) -> None:
    from peft.tuners.lora import LoraLayer

    for module in peft_model.modules() if scale != 1.0 else ():
        if isinstance(module, LoraLayer) and name in module.scaling:
            module.scaling[name] *= scale
