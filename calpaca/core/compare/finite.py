"""Finding where a model's numbers stop being finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def first_not_finite(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Run `model` once more on `inputs` and say which layer is the first to give NaN or inf, and why if that is known.

    Layers report when they end, so the first one is the innermost.
    """
    found: list[str] = []
    hooks = [module.register_forward_hook(_watch(name, found)) for name, module in model.named_modules() if name]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "no layer, when it is run again"


def _watch(name: str, found: list[str]) -> Any:
    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        if not found and any(_bad(tensor) for tensor in _tensors(output)):
            found.append(_described(name, module))

    return look


def _described(name: str, module: nn.Module) -> str:
    """A layer's name without PEFT's wrapping, and those of its own parameters that are not finite."""
    own = [f"{each} has {count}" for each, tensor in module.named_parameters() if (count := _bad(tensor))]
    return name.removeprefix("base_model.model.") + (f" (its {', '.join(own)} such values)" if own else "")


def _tensors(output: Any) -> Iterator[Tensor]:
    if hasattr(output, "isfinite"):
        yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from _tensors(each)


def _bad(tensor: Tensor) -> int:
    """Values that are NaN or inf."""
    return int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
