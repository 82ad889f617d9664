"""The models that the server offers: language models, an embedding model, and apps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from calpaca.core.catalogue import DEFAULT_EMBEDDING
from calpaca.core.embedding import Embedder
from calpaca.core.engine import AdapterEngine
from calpaca.core.errors import UnsupportedError, UsageError
from calpaca.core.files import AdapterFiles
from calpaca.core.model import Model
from calpaca.core.runtime import Runtime
from calpaca.core.sources import resolve_adapter
from calpaca.core.spec import AdapterSpec, ModelSpec, is_address
from calpaca.plugins.exposure import answers_and_reads
from calpaca.plugins.instances import Instance, instances
from calpaca_openai_api.app_runs import AppRuns
from calpaca_openai_api.faults import ApiError, unknown_model

APP = "app:"


class ServedModel:
    """A language model under an id, loaded at its first use."""

    def __init__(self, id: str, spec: ModelSpec, runtime: Runtime, parent: str | None = None) -> None:
        self.id = id
        self.spec = spec
        self.parent = parent
        self._runtime = runtime
        self._model: Model | None = None
        self._lock = threading.Lock()
        self._fingerprint: Future[str] = Future()

    def load(self) -> Model:
        """The model. The first call takes long: not for an event loop. Raises ModelError."""
        with self._lock:
            if self._model is None:
                self._model = self._open()
                threading.Thread(target=self._take_fingerprint, args=[self._model], daemon=True).start()
            return self._model

    @property
    def loaded(self) -> Model | None:
        """The model, if it is loaded."""
        return self._model

    def _open(self) -> Model:
        return self._runtime.model(self.spec)

    async def get(self) -> Model:
        """The model, without holding up the event loop."""
        return self._model if self._model is not None else await asyncio.to_thread(self.load)

    @property
    def fingerprint(self) -> str | None:
        """What identifies the weights, once it is known: files of many gigabytes are read for it."""
        return self._fingerprint.result() if self._fingerprint.done() else None

    def _take_fingerprint(self, model: Model) -> None:
        with suppress(Exception):
            self._fingerprint.set_result(f"fp_{model.fingerprint[:16]}")


class ServedAdapter(ServedModel):
    """A LoRA adapter on a served model, under an id of its own; both run on one engine, side by side."""

    def __init__(self, id: str, adapter: AdapterSpec, base: ServedModel, runtime: Runtime) -> None:
        super().__init__(id, base.spec, runtime, parent=base.id)
        self._adapter = adapter
        self._base = base

    def _open(self) -> Model:
        """Raises ModelError for an adapter of another base, UnsupportedError for one that must be merged."""
        base = self._base.load()
        found = resolve_adapter(self._adapter.source, self._runtime)
        _adapter_engine(base).load_adapter(self.id, found.path, self._adapter.scale)
        return base.adapted(AdapterFiles(self.id, found.path, self._adapter.scale))

    def unload(self) -> None:
        """Take no more requests; running ones end."""
        if self._model is not None:
            _adapter_engine(self._model).unload_adapter(self.id)


def _adapter_engine(model: Model) -> AdapterEngine:
    """Raises UnsupportedError."""
    if isinstance(model.engine, AdapterEngine) and model.engine.capabilities().adapters:
        return model.engine
    raise UnsupportedError(
        f"The engine '{model.engine.name}' does not run '{model.name}' with several adapters side by side.",
        "Use --engine transformers, or put the adapter on the model for good: --adapter PATH, without a name.",
    )


class ServedEmbedder:
    """An embedding model under an id, loaded at its first use."""

    def __init__(self, id: str, reference: str | None, runtime: Runtime) -> None:
        self.id = id
        self._reference = reference
        self._runtime = runtime
        self._embedder: Embedder | None = None

    async def get(self) -> Embedder:
        if self._embedder is None:
            self._embedder = await asyncio.to_thread(self._runtime.embedder, self._reference)
        return self._embedder


class ServedApp:
    """An installed app, or a configured one, under the id `app:NAME`."""

    def __init__(self, instance: Instance, presets: Mapping[str, Any], runtime: Runtime) -> None:
        self.id = f"{APP}{instance.name}"
        self.instance = instance
        self.runs = AppRuns(instance.app, presets, runtime)


Served = ServedModel | ServedEmbedder | ServedApp


class ServedModels:
    """Everything that can be asked, by id. `main` is the language model of requests that name none."""

    def __init__(
        self,
        runtime: Runtime,
        spec: ModelSpec,
        embedding: str | None = None,
        adapters: Mapping[str, AdapterSpec] = MappingProxyType({}),
    ) -> None:
        """`spec` is the main model's, `adapters` run beside it. Loads it where nothing else tells its name.

        Raises ModelError, UsageError for a name that is taken.
        """
        self.runtime = runtime
        self.created = int(time.time())
        self._changing = threading.Lock()
        named = runtime.settings.models
        self.main = ServedModel(_main_id(spec, runtime), spec, runtime)
        found: list[Served] = [self.main]
        found += [ServedModel(name, ModelSpec(model=name), runtime) for name in named]
        reference = embedding or runtime.settings.embedding
        self.embedder = ServedEmbedder(reference or DEFAULT_EMBEDDING.name, reference, runtime)
        found.append(self.embedder)
        presets = _model_options(spec, reference)
        apps = [instance for instance in instances(runtime).values() if answers_and_reads(instance.app)]
        found += [ServedApp(instance, {**presets, **instance.presets}, runtime) for instance in apps]
        self._by_id: dict[str, Served] = {}
        for served in found:
            self._by_id.setdefault(served.id, served)
        for name, adapter in adapters.items():
            self._add(ServedAdapter(name, adapter, self.main, runtime))

    @property
    def ids(self) -> list[str]:
        return list(self._by_id)

    def find(self, id: str) -> Served:
        """Raises ApiError 404."""
        if id not in self._by_id:
            raise unknown_model(id, self.ids)
        return self._by_id[id]

    def language_model(self, id: str | None) -> ServedModel:
        """The model that answers; None is the main one. Raises ApiError."""
        served = self.main if id is None else self.find(id)
        if not isinstance(served, ServedModel):
            raise ApiError(400, f"'{served.id}' is no language model; it cannot be asked for this.", param="model")
        return served

    def local(self) -> Iterator[tuple[ServedModel, Model]]:
        """The loaded models whose weights are on this machine."""
        for served in self._by_id.values():
            if isinstance(served, ServedModel) and served.loaded is not None and served.loaded.files is not None:
                yield served, served.loaded

    def twins(self, served: ServedModel) -> list[Model]:
        """The loaded models of the same weights on other engines, which may do what its own does not."""
        if served.loaded is None or served.fingerprint is None:
            return []
        return [
            other.loaded
            for other in self._by_id.values()
            if isinstance(other, ServedModel)
            and other.loaded is not None
            and other.loaded.engine is not served.loaded.engine
            and other.fingerprint == served.fingerprint
        ]

    def embedding_model(self, id: str | None) -> ServedEmbedder:
        """Raises ApiError."""
        served = self.embedder if id is None else self.find(id)
        if not isinstance(served, ServedEmbedder):
            raise ApiError(400, f"'{served.id}' is no embedding model; '{self.embedder.id}' is.", param="model")
        return served

    # Adapters, while the server runs --------------------------------------------------------------------------------
    def load_adapters(self) -> None:
        """Load the adapters that are served beside a model. Raises ModelError."""
        for served in self._by_id.values():
            if isinstance(served, ServedAdapter):
                served.load()

    def add_adapter(self, id: str, adapter: AdapterSpec, base: str | None) -> None:
        """Load an adapter on a served model, None is the main one. Raises ApiError, ModelError, UsageError."""
        served = ServedAdapter(id, adapter, self.language_model(base), self.runtime)
        with self._changing:
            self._check_free(id)
            served.load()
            self._add(served)

    def remove_adapter(self, id: str) -> None:
        """Serve an adapter no longer; running requests end. Raises ApiError."""
        with self._changing:
            served = self.find(id)
            if not isinstance(served, ServedAdapter):
                raise ApiError(400, f"'{id}' is no adapter.", param="lora_name")
            self._by_id = {each: other for each, other in self._by_id.items() if each != id}
            served.unload()

    def _add(self, served: Served) -> None:
        self._check_free(served.id)
        self._by_id = {**self._by_id, served.id: served}  # replaced, since others may be reading it

    def _check_free(self, id: str) -> None:
        if id in self._by_id:
            raise UsageError(f"A model called '{id}' is served already.", "Choose another name, or unload it first.")

    def describe(self, id: str) -> dict[str, Any]:
        """OpenAI's Model; an adapter also names its `parent`. Raises ApiError 404."""
        served = self.find(id)
        model = {"id": id, "object": "model", "created": self.created, "owned_by": "calpaca"}
        return {**model, "parent": served.parent} if isinstance(served, ServedAdapter) else model


def _main_id(spec: ModelSpec, runtime: Runtime) -> str:
    """What the model is called: as it was named (a file or server's model without its address), else its own name."""
    name = spec.model or runtime.settings.model or runtime.model(spec).name
    return name.rpartition("#")[2] if is_address(name) else name


def _model_options(spec: ModelSpec, embedding: str | None) -> dict[str, Any]:
    """The models that the server runs, as an app's options."""
    options = spec.model_dump(exclude_defaults=True)
    if spec.adapters:
        options["adapters"] = [str(adapter) for adapter in spec.adapters]
    return {**options, "embedding": embedding} if embedding else options
