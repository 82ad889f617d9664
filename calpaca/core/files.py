"""The files that a model spec needs, found on disk before anything is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from calpaca.core.fingerprint import fingerprint
from calpaca.core.spec import ModelSpec
from calpaca.core.template import NamedTemplate, named_template
from calpaca.core.tokenizer import has_tokenizer

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime


@dataclass(frozen=True)
class AdapterFiles:
    """One adapter: its folder, what the person called it, and its scale."""

    name: str
    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class ModelFiles:
    """Where everything lies: the base's folder, the adapters in order, the folder of the tokenizer, the template."""

    name: str
    spec: ModelSpec
    weights: Path
    adapters: tuple[AdapterFiles, ...]
    tokenizer: Path
    template: NamedTemplate | None

    @cached_property
    def fingerprint(self) -> str:
        """Digest of contents: the base alone has the digest of its folder; adapters, another tokenizer or another
        template give another one."""
        base = fingerprint(self.weights)
        additions = [f"adapter {fingerprint(adapter.path)} {adapter.scale!r}" for adapter in self.adapters]
        if self.tokenizer != self.weights:
            additions.append(f"tokenizer {fingerprint(self.tokenizer)}")
        if self.template is not None:
            additions.append(f"template {hashlib.sha256(self.template.source.encode()).hexdigest()}")
        return hashlib.sha256("\n".join([base, *additions]).encode()).hexdigest() if additions else base


def find_files(spec: ModelSpec, runtime: Runtime) -> ModelFiles:
    """Find, and fetch where needed, everything `spec` names. Raises ModelError for what cannot be found.

    The tokenizer is the one the spec names, else that of the last adapter that brings one, else the base's.
    """
    from calpaca.core.sources import resolve_adapter, resolve_model

    base = resolve_model(spec.model, runtime, revision=spec.revision, format="hf")
    adapters = tuple(
        AdapterFiles(found.name, found.path, adapter.scale)
        for adapter in spec.adapters
        for found in [resolve_adapter(adapter.source, runtime)]
    )
    with_tokenizer = [adapter.path for adapter in adapters if has_tokenizer(adapter.path)]
    tokenizer = with_tokenizer[-1] if with_tokenizer else base.path
    if spec.tokenizer is not None:
        tokenizer = resolve_model(spec.tokenizer, runtime, format="hf").path
    template = named_template(spec.chat_template) if spec.chat_template is not None else None
    return ModelFiles(base.name, spec, base.path, adapters, tokenizer, template)
