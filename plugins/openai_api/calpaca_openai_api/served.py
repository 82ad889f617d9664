"""The models that the server offers: language models, an embedding model, and apps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from calpaca.core.catalogue import DEFAULT_EMBEDDING
from calpaca.core.embedding import Embedder
from calpaca.core.model import Model
from calpaca.core.runtime import Runtime
from calpaca.core.spec import ModelSpec, is_address
from calpaca.plugins.app import App
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
                self._model = self._runtime.model(self.spec)
                threading.Thread(target=self._take_fingerprint, args=[self._model], daemon=True).start()
            return self._model

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

    def __init__(self, runtime: Runtime, spec: ModelSpec, embedding: str | None = None) -> None:
        """`spec` is the main model's. Loads it where nothing else tells its name. Raises ModelError."""
        self.runtime = runtime
        self.created = int(time.time())
        named = runtime.settings.models
        self.main = ServedModel(_main_id(spec, runtime), spec, runtime)
        found: list[Served] = [self.main]
        found += [ServedModel(name, ModelSpec(model=name), runtime) for name in named]
        reference = embedding or runtime.settings.embedding
        self.embedder = ServedEmbedder(reference or DEFAULT_EMBEDDING.name, reference, runtime)
        found.append(self.embedder)
        presets = _model_options(spec, reference)
        apps = [instance for instance in instances(runtime).values() if _answers_and_reads(instance.app)]
        found += [ServedApp(instance, {**presets, **instance.presets}, runtime) for instance in apps]
        self._by_id: dict[str, Served] = {}
        for served in found:
            self._by_id.setdefault(served.id, served)

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

    def embedding_model(self, id: str | None) -> ServedEmbedder:
        """Raises ApiError."""
        served = self.embedder if id is None else self.find(id)
        if not isinstance(served, ServedEmbedder):
            raise ApiError(400, f"'{served.id}' is no embedding model; '{self.embedder.id}' is.", param="model")
        return served

    def describe(self, id: str) -> dict[str, Any]:
        """OpenAI's Model. Raises ApiError 404."""
        self.find(id)
        return {"id": id, "object": "model", "created": self.created, "owned_by": "calpaca"}


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


def _answers_and_reads(app: App) -> bool:
    return app.kind == "answer" and app.effects == "read" and app.input is not None
