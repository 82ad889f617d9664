"""What an adapter does to one tensor of the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar, Protocol

from calpaca.core.adapters import Adapter
from calpaca.core.checkpoint.memory import Memory
from calpaca.core.merge import arithmetic

if TYPE_CHECKING:
    from torch import Tensor

Workspace = Callable[[tuple[int, int]], "Tensor"]
"""Gives float32 memory of a shape, to be used until it is asked again."""


class Change(Protocol):
    """One adapter's change of one tensor. `kind` names it for people."""

    @property
    def adapter(self) -> Adapter: ...

    @property
    def kind(self) -> str: ...

    def apply(self, weight: Tensor, workspace: Workspace, /) -> Tensor:
        """The tensor with the change in it, in the same dtype and, where that can be, the same memory."""
        ...

    def describe(self) -> str:
        """Everything that decides the result beside the base and the adapter's file."""
        ...

    def memory(self, shape: tuple[int, ...]) -> int:
        """Bytes that `apply` needs beside the weight."""
        ...


@dataclass(frozen=True)
class LowRank:
    """A product of two narrow matrices is added; with a `magnitude` the sum is scaled to it row by row (DoRA).

    `a` and `b` name the adapter's tensors. `rounded` products are rounded to the weight's dtype before they are added.
    """

    adapter: Adapter
    a: str
    b: str
    scaling: float
    magnitude: str | None = None
    transposed: bool = False
    rounded: bool = False

    @property
    def kind(self) -> str:
        return "DoRA" if self.magnitude else "embedding LoRA" if "embedding" in self.a else "LoRA"

    def apply(self, weight: Tensor, workspace: Workspace, /) -> Tensor:
        import torch

        dtype = torch.promote_types(weight.dtype, torch.float32)
        a, b = self.adapter.read(self.a).to(dtype), self.adapter.read(self.b).to(dtype)
        out = workspace((len(b), a.shape[1])) if dtype == torch.float32 else None
        product = arithmetic.low_rank(a, b, self.scaling, out)
        if self.magnitude is not None:
            magnitude = self.adapter.read(self.magnitude).to(dtype)
            return arithmetic.add_scaled(weight, product, magnitude, transposed=self.transposed)
        if self.rounded:
            return arithmetic.add_rounded(weight, product, transposed=self.transposed)
        return arithmetic.add(weight, product, transposed=self.transposed)

    def describe(self) -> str:
        rest = f", magnitude {self.magnitude}" if self.magnitude else ""
        return f"{self.kind} {self.b} x {self.a} x {self.scaling!r}{rest} of {self.adapter.files.name}"

    def memory(self, shape: tuple[int, ...]) -> int:
        copies = 3 if self.rounded or (self.transposed and self.magnitude) else 1
        return copies * 4 * prod(shape)


@dataclass(frozen=True)
class Bias:
    """A vector times the scaling is added to a layer's bias (`lora_bias`)."""

    adapter: Adapter
    name: str
    scaling: float

    kind: ClassVar[str] = "bias"

    def apply(self, weight: Tensor, _workspace: Workspace, /) -> Tensor:
        return arithmetic.add(weight, self.adapter.read(self.name).float().mul_(self.scaling))

    def describe(self) -> str:
        return f"{self.name} x {self.scaling!r} of {self.adapter.files.name}"

    def memory(self, shape: tuple[int, ...]) -> int:
        return 4 * prod(shape)


@dataclass(frozen=True)
class Rows:
    """Some rows are replaced: tokens that were trained alone."""

    adapter: Adapter
    name: str
    indices: tuple[int, ...]

    kind: ClassVar[str] = "token rows"

    def apply(self, weight: Tensor, _workspace: Workspace, /) -> Tensor:
        return arithmetic.replace_rows(weight, self.adapter.read(self.name), self.indices)

    def describe(self) -> str:
        return f"{self.name} at {list(self.indices)} of {self.adapter.files.name}"

    def memory(self, shape: tuple[int, ...]) -> int:
        return 4 * len(self.indices) * prod(shape[1:])


class Scratch:
    """Memory that is kept from one tensor to the next: fresh pages cost more time than a product itself.

    Called, it gives that of a product; `weights` lends that of weights, which are still written when the next is made.
    """

    def __init__(self) -> None:
        import torch

        self._memory = torch.empty(0)
        self.weights = Memory()

    def __call__(self, shape: tuple[int, int]) -> Tensor:
        import torch

        if len(self._memory) < prod(shape):
            self._memory = torch.empty(prod(shape))
        return self._memory[: prod(shape)].view(shape)
