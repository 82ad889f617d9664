"""The runtime: registries, settings and what is loaded, in one object that everything gets passed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from calpaca.core.embedding import Embedder, SentenceTransformerEmbedder
from calpaca.core.jobs import Ledger
from calpaca.core.paths import data_dir
from calpaca.core.registry import Component, Registry
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec

if TYPE_CHECKING:
    from calpaca.core.model import Model


class Runtime:
    """Holds the registries, which plugins fill, and loads each model once.

    Thread-safe. `close()` frees the models; a runtime is also a context manager.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engines: Registry[Component] = Registry("engine")
        self.sources: Registry[Component] = Registry("model source")
        self.loaders: Registry[Component] = Registry("document loader")
        self.stores: Registry[Component] = Registry("vector store")
        self.apps: Registry[Component] = Registry("app")
        self.plugins: Any = None  # what discovery found; opaque here, since plugins lie above the core
        self._models: dict[str, Model] = {}
        self._embedders: dict[str, Embedder] = {}
        self._lock = threading.RLock()
        self._jobs: Ledger | None = None

    @property
    def jobs(self) -> Ledger:
        """The job ledger."""
        with self._lock:
            if self._jobs is None:
                self._jobs = Ledger(data_dir() / "jobs.sqlite")
            return self._jobs

    def spec(self, model: ModelSpec | str | None = None) -> ModelSpec:
        """A spec with the settings applied: a name from `[models]`, the default model, device and engine."""
        wanted = ModelSpec(model=model) if model is None or isinstance(model, str) else model
        wanted = wanted if wanted.model else wanted.model_copy(update={"model": self.settings.model})
        named = self.settings.models.get(wanted.model or "")
        if named is not None:
            given = wanted.model_dump(exclude_defaults=True, exclude={"model", "adapters"})
            wanted = named.model_copy(update={**given, "adapters": named.adapters + wanted.adapters})
        defaults = {
            field: getattr(self.settings, field) for field in ("device", "engine") if getattr(wanted, field) == "auto"
        }
        return wanted.model_copy(update=defaults)

    def check(self, model: ModelSpec | str | None = None) -> ModelSpec:
        """The spec with the settings applied, if all its names are known. Loads nothing and asks no network.

        Raises ModelNotFoundError or UsageError that names the nearest known name.
        """
        from calpaca.core.sources import check_model
        from calpaca.core.template import named_template

        spec = self.spec(model)
        if spec.model is not None:
            check_model(spec.model, self)
        if spec.engine != "auto":
            self.engines.get(spec.engine)
        if spec.chat_template is not None:
            named_template(spec.chat_template)
        return spec

    def check_embedding(self, name: str) -> None:
        """Raise ModelNotFoundError for a name that can name no embedding model. Asks no network."""
        from calpaca.core.sources import check_embedding

        check_embedding(name, self)

    def model(self, model: ModelSpec | str | None = None) -> Model:
        """Load a model, or give the one that is loaded for the same spec. Raises ModelError."""
        from calpaca.core.model import Model

        spec = self.spec(model)
        key = spec.model_dump_json()
        with self._lock:
            if key not in self._models:
                self._models[key] = Model.load(spec, self)
            return self._models[key]

    def loaded(self, model: ModelSpec | str | None = None) -> Model | None:
        """The model of this spec if it is loaded already."""
        with self._lock:
            return self._models.get(self.spec(model).model_dump_json())

    def embedder(self, name: str | None = None) -> Embedder:
        """Load an embedding model by name, id or folder; None is the settings' or the catalogue's default."""
        from calpaca.core.sources import resolve_embedding

        wanted = name or self.settings.embedding or ""
        with self._lock:
            if wanted not in self._embedders:
                found = resolve_embedding(wanted or None, self)
                self._embedders[wanted] = SentenceTransformerEmbedder(found.name, found.path, self.settings.device)
            return self._embedders[wanted]

    def close(self) -> None:
        """Free what is loaded. Idempotent."""
        with self._lock:
            for model in self._models.values():
                model.close()
            self._models.clear()
            self._embedders.clear()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
