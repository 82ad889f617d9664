"""From an adapter's file to the changes it makes: every tensor finds its place, and every place its tensor.

What is not understood is refused by its name. Sources: PEFT's `tuners/lora/config.py`, `tuners/tuners_utils.py` (which
modules are targeted) and `utils/save_and_load.py` (names of tensors), version 0.21.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from calpaca.core.adapters import HEAD, Adapter, Shapes, is_replacement
from calpaca.core.errors import AdapterError, UnsupportedError
from calpaca.core.merge import arithmetic
from calpaca.core.merge.base_model import BaseModel
from calpaca.core.merge.changes import Bias, Change, LowRank, Rows

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
)
_TOKENS = "token_adapter.trainable_tokens_delta"
_UNDERSTOOD = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias",
    "fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "trainable_token_indices", "ensure_weight_tying", "init_lora_weights",
}  # fmt: skip
_WITHOUT_EFFECT = {  # on merged weights: where it came from, how it was trained, and sizes of what is switched off
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
    "lora_dropout", "runtime_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size",
}  # fmt: skip


def bind(adapter: Adapter, base: BaseModel, shapes: Shapes) -> dict[str, list[Change]]:
    """The changes that an adapter makes, by the name of the tensor; whole tensors that it replaces are not among them.

    `shapes` are those of the model as it is when the adapter's turn comes, its own replacements included.
    Raises UnsupportedError for a feature, AdapterError for tensors that do not fit.
    """
    _check_features(adapter.config, adapter.files.name)
    parts = _parts(adapter)
    for name in adapter.replaced:
        _refuse_scale(adapter, name)  # whole tensors have no strength that could be halved
    _check_targets(adapter, [module for module, names in parts.items() if _is_low_rank(names)], shapes)
    changes: dict[str, list[Change]] = defaultdict(list)
    for module, names in parts.items():
        if _TOKENS in names:
            changes[f"{module}.weight"].append(_rows(adapter, module, shapes))
        if _is_low_rank(names):
            changes[f"{module}.weight"].append(_low_rank(adapter, module, names, base, shapes))
        if "lora_B.bias" in names:
            changes[f"{module}.bias"].append(_bias(adapter, module, shapes))
    return changes


# ---- what the configuration says -----------------------------------------------------------------------------------


def _check_features(config: Mapping[str, Any], name: str) -> None:
    unknown = [key for key, value in config.items() if value and key not in _UNDERSTOOD | _WITHOUT_EFFECT]
    if unknown:
        raise UnsupportedError(
            f"Adapter {name} uses {', '.join(unknown)}, which cannot be merged.",
            "Use the adapter unmerged, with --adapter. If the setting changes no weight, remove it from"
            " adapter_config.json.",
        )


def _targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether the configuration targets a module, by the rules of PEFT's `check_target_module_exists`."""
    targets = config["target_modules"]
    saved = config.get("modules_to_save") or ()
    if _matches(config.get("exclude_modules"), module) or any(_within(each, module) for each in saved):
        return False
    if isinstance(targets, str) or module in targets:
        return _matches(targets, module)
    return _matches(targets, module) and _in_layers(config, module)


def _matches(patterns: str | Sequence[str] | None, module: str) -> bool:
    """A text is a regular expression for the whole path, a list holds paths or their ends."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == pattern or module.endswith(f".{pattern}") for pattern in patterns or ())


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module lies in one of the layers that `layers_to_transform` lists, if it lists any."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or [r"[^.]*"]
    if layers is None or layers == []:
        return True
    names = [patterns] if isinstance(patterns, str) else patterns
    matches = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module) for name in names)
    match = next((each for each in matches if each is not None), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def _check_targets(adapter: Adapter, found: Sequence[str], shapes: Shapes) -> None:
    """The modules with low-rank tensors must be those that the configuration targets, no more and no fewer."""
    config = adapter.config
    if config.get("target_modules") in (None, "all-linear"):
        return  # PEFT has rules of its own for these, by architecture
    modules = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2}
    wanted = {module for module in modules if _targeted(config, module)}
    if config.get("ensure_weight_tying") and HEAD.removesuffix(".weight") in found:
        wanted.add(HEAD.removesuffix(".weight"))  # as the other end of the embeddings
    _refuse(adapter, "are not targeted by its adapter_config.json", [each for each in found if each not in wanted])
    _refuse(adapter, "are targeted, but got no tensors", sorted(wanted - set(found)))


def _refuse(adapter: Adapter, problem: str, names: Sequence[str]) -> None:
    if names:
        raise AdapterError(
            f"Adapter {adapter.files.name}: {len(names)} modules {problem} ({_few(names)}).",
            "Take the adapter_config.json and the weights that were saved together.",
        )


# ---- what the file holds -------------------------------------------------------------------------------------------


def _parts(adapter: Adapter) -> dict[str, dict[str, str]]:
    """Modules with the parts that the file holds of each: part → name. Raises AdapterError for anything else."""
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    unknown = []
    for name in adapter.shapes:
        match = _PART.fullmatch(name)
        if match is not None:
            parts[match["module"]][match["part"]] = name
        elif not is_replacement(name):
            unknown.append(name)
    if unknown:
        raise AdapterError(
            f"{adapter.weights} holds {len(unknown)} of {len(adapter.shapes)} tensors that have no known place"
            f" ({_few(unknown)}).",
            "Such an adapter can only be used by the program that made it.",
        )
    _check_saved(adapter)
    if adapter.config.get("trainable_token_indices") and not any(_TOKENS in names for names in parts.values()):
        raise _incomplete(adapter, "tokens (trainable_token_indices)")
    return parts


def _check_saved(adapter: Adapter) -> None:
    """Modules that were trained whole must be in the file."""
    saved = adapter.config.get("modules_to_save") or ()
    modules = [name.rpartition(".")[0] for name in adapter.replaced]
    missing = [each for each in saved if not any(_within(each, module) for module in modules)]
    if missing:
        raise _incomplete(adapter, f"{', '.join(missing)} (modules_to_save)")


def _incomplete(adapter: Adapter, what: str) -> AdapterError:
    return AdapterError(
        f"Adapter {adapter.files.name} should replace {what}, but {adapter.weights.name} holds nothing for it.",
        "Take the adapter_config.json and the weights that were saved together.",
    )


def _within(saved: str, module: str) -> bool:
    return re.search(rf"(^|\.){re.escape(saved)}(\.|$)", module) is not None


def _is_low_rank(parts: Iterable[str]) -> bool:
    return any(part.startswith("lora_") for part in parts)


def _low_rank(adapter: Adapter, module: str, names: Mapping[str, str], base: BaseModel, shapes: Shapes) -> LowRank:
    config, embedding = adapter.config, any("embedding" in part for part in names)
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    needed = {a, b, *(["lora_magnitude_vector"] if config.get("use_dora") else [])}
    needed |= {"lora_B.bias"} if config.get("lora_bias") else set()
    if needed != names.keys() - {_TOKENS}:
        raise AdapterError(
            f"Adapter {adapter.files.name}: {module} should have {_listed(needed)}, but"
            f" {adapter.weights.name} holds {_listed(names.keys() - {_TOKENS})}.",
            "Take the adapter_config.json and the weights that were saved together.",
        )
    change = LowRank(
        adapter, names[a], names[b], arithmetic.scaling(config, module) * adapter.files.scale,
        magnitude=names.get("lora_magnitude_vector"),
        transposed=embedding or base.transposed,
        rounded=embedding or config.get("init_lora_weights") == "mica",
    )  # fmt: skip
    _check_shapes(adapter, module, change, shapes)
    return change


def _check_shapes(adapter: Adapter, module: str, change: LowRank, shapes: Shapes) -> None:
    """A is [r, in], B [out, r] and the magnitude [out], with the r of this very module."""
    own, rank = shapes[f"{module}.weight"], arithmetic.rank(adapter.config, module)
    out_size, in_size = own[::-1] if change.transposed else own
    wanted: dict[str, tuple[int, ...]] = {change.a: (rank, in_size), change.b: (out_size, rank)}
    if change.magnitude is not None:
        wanted[change.magnitude] = (out_size,)
    for name, shape in wanted.items():
        if adapter.shapes[name] != shape:
            raise AdapterError(
                f"Adapter {adapter.files.name}: {name} is {list(adapter.shapes[name])}; with rank {rank} on a weight of"
                f" {list(own)} it must be {list(shape)}.",
                "Take the adapter_config.json that was saved with these weights, and the base they were trained on.",
            )


def _bias(adapter: Adapter, module: str, shapes: Shapes) -> Bias:
    name, own = f"{module}.lora_B.bias", shapes.get(f"{module}.bias")
    if own != adapter.shapes[name]:
        has = f"has one of {list(own)}" if own is not None else "has none"
        raise AdapterError(
            f"Adapter {adapter.files.name} adds {list(adapter.shapes[name])} to the bias of {module}, but the base {has}.",
            "An adapter with lora_bias can only be merged into layers with a bias; use it unmerged, with --adapter.",
        )
    return Bias(adapter, name, arithmetic.scaling(adapter.config, module) * adapter.files.scale)


def _rows(adapter: Adapter, module: str, shapes: Shapes) -> Rows:
    name, own = f"{module}.{_TOKENS}", shapes.get(f"{module}.weight")
    indices = _token_indices(adapter.config, module)
    if own is None or indices is None or adapter.shapes[name] != (len(indices), *own[1:]):
        raise AdapterError(
            f"Adapter {adapter.files.name} holds {list(adapter.shapes[name])} for tokens of {module}; its"
            f" adapter_config.json lists {len(indices or ())} of them and the base has {list(own or ())}.",
            "Take the adapter_config.json that was saved with these weights, and the base they were trained on.",
        )
    beyond = [index for index in indices if not 0 <= index < own[0]]
    if beyond:
        raise AdapterError(
            f"Adapter {adapter.files.name} trains token {beyond[0]}, but {module} has {own[0]} rows.",
            "Name a base whose vocabulary was extended already.",
        )
    _refuse_scale(adapter, f"rows of {module}")
    return Rows(adapter, name, tuple(indices))


def _token_indices(config: Mapping[str, Any], module: str) -> Sequence[int] | None:
    indices: Sequence[int] | Mapping[str, Sequence[int]] | None = config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        return next((each for name, each in indices.items() if _matches([name], module)), None)
    return indices  # those of the input embeddings, and of what is tied to them


def _refuse_scale(adapter: Adapter, what: str) -> None:
    if adapter.files.scale != 1.0:
        raise UnsupportedError(
            f"Adapter {adapter.files.name} replaces {what} and cannot be scaled by {adapter.files.scale:g}.",
            "Use it without a scale.",
        )


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(sorted(parts)) or "nothing"


def _few(names: Sequence[str]) -> str:
    return ", ".join(islice(names, 3)) + (", …" if len(names) > 3 else "")
