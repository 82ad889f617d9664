"""The runtime: registries, settings and what is loaded, in one object that everything gets passed."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Any

from calpaca.core.embedding import Embedder, SentenceTransformerEmbedder
from calpaca.core.engine import EngineComponent
from calpaca.core.engine_choice import Purpose
from calpaca.core.jobs import Ledger
from calpaca.core.paths import data_dir
from calpaca.core.registry import Component, Registry
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec, is_address

if TYPE_CHECKING:
    from calpaca.core.model import Model
    from calpaca.core.reranker import Reranker
    from calpaca.core.sessions import Sessions


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
        self.purpose: Purpose = "chat"  # a server sets `load` before it loads a model; `auto` engines differ
        self.attaches = False  # whether a model that a running server has loaded is asked there; `calpaca run` sets it
        self.plugins: Any = None  # what discovery found; opaque here, since plugins lie above the core
        self._models: dict[str, Model] = {}
        self._embedders: dict[str, Embedder] = {}
        self._rerankers: dict[str, Reranker] = {}
        self._lock = threading.RLock()
        self._jobs: Ledger | None = None
        self._sessions: Sessions | None = None

    @property
    def jobs(self) -> Ledger:
        """The job ledger."""
        with self._lock:
            if self._jobs is None:
                self._jobs = Ledger(data_dir() / "jobs.sqlite")
            return self._jobs

    @property
    def sessions(self) -> Sessions:
        """The conversations that are kept."""
        from calpaca.core.sessions import Sessions

        with self._lock:
            if self._sessions is None:
                self._sessions = Sessions(data_dir() / "sessions.sqlite")
            return self._sessions

    def spec(self, model: ModelSpec | str | None = None) -> ModelSpec:
        """A spec with the settings applied: a name from `[models]`, the default model, device and engine."""
        wanted = ModelSpec(model=model) if model is None or isinstance(model, str) else model
        wanted = wanted if wanted.model else wanted.model_copy(update={"model": self.settings.model})
        named = self.settings.models.get(wanted.model or "")
        if named is not None:
            given = wanted.model_dump(exclude_defaults=True, exclude={"model", "adapters"})
            if wanted.api_key is not None:  # no dump holds it
                given["api_key"] = wanted.api_key
            wanted = named.model_copy(update={**given, "adapters": named.adapters + wanted.adapters})
        if wanted.engine == "auto":
            engine = "remote" if is_address(wanted.model) else self.settings.engine
            wanted = wanted.model_copy(update={"engine": engine})
        if wanted.device == "auto" and self.is_local(wanted):
            wanted = wanted.model_copy(update={"device": self.settings.device})
        return wanted

    def is_local(self, spec: ModelSpec) -> bool:
        """Whether the spec's engine runs weights on this machine; a server's model is looked for in no source."""
        component = self.engines.get(spec.engine) if spec.engine in self.engines else None
        return not isinstance(component, EngineComponent) or component.local

    def check(self, model: ModelSpec | str | None = None) -> ModelSpec:
        """The spec with the settings applied, if all its names are known. Loads nothing and asks no network.

        Raises ModelNotFoundError or UsageError that names the nearest known name.
        """
        from calpaca.core.sources import check_model
        from calpaca.core.template import named_template

        spec = self.spec(model)
        if spec.model is not None and self.is_local(spec):
            check_model(spec.model, self)
        if spec.engine != "auto":
            self.engines.get(spec.engine)
        if spec.chat_template is not None:
            named_template(spec.chat_template)
        return spec

    def check_embedding(self, name: str) -> None:
        """Raise ModelNotFoundError for a name that can name no embedding model. Asks no network."""
        from calpaca.core.sources import check_embedding

        if not is_address(name):
            check_embedding(name, self)

    def model(self, model: ModelSpec | str | None = None) -> Model:
        """Load a model, or give the one that is loaded for the same spec. Raises ModelError."""
        from calpaca.core.model import Model

        spec = self.spec(model)
        key = self._key(spec)
        with self._lock:
            if key not in self._models:
                self._models[key] = Model.load(spec, self)
            return self._models[key]

    def loaded(self, model: ModelSpec | str | None = None) -> Model | None:
        """The model of this spec if it is loaded already."""
        with self._lock:
            return self._models.get(self._key(self.spec(model)))

    def _key(self, spec: ModelSpec) -> str:
        """What loaded models are kept under: a server may offer other models to another key."""
        secret = spec.api_key.get_secret_value() if spec.api_key is not None and not self.is_local(spec) else ""
        return spec.model_dump_json() + hashlib.sha256(secret.encode()).hexdigest()

    def embedder(self, name: str | None = None) -> Embedder:
        """Load an embedding model by name, id, folder or address; None is the settings' or the catalogue's default."""
        wanted = name or self.settings.embedding or ""
        with self._lock:
            if wanted not in self._embedders:
                self._embedders[wanted] = self._open_embedder(wanted)
            return self._embedders[wanted]

    def _open_embedder(self, wanted: str) -> Embedder:
        if is_address(wanted):
            from calpaca.core.engines.remote.embedder import RemoteEmbedder

            return RemoteEmbedder(wanted, self.settings.remote)
        from calpaca.core.sources import resolve_embedding

        found = resolve_embedding(wanted or None, self)
        return SentenceTransformerEmbedder(found.name, found.path, self.settings.device)

    def reranker(self, name: str) -> Reranker:
        """Load a reranker by name, id or folder. Raises ModelError, and MissingExtraError without what it runs on."""
        from calpaca.core.catalogue import ENTRIES
        from calpaca.core.reranker import open_reranker
        from calpaca.core.sources import resolve_reranker

        with self._lock:
            if name not in self._rerankers:
                found = resolve_reranker(name, self)
                languages = ENTRIES[found.name].languages if found.name in ENTRIES else ""
                self._rerankers[name] = open_reranker(found.name, found.path, self.settings.device, languages)
            return self._rerankers[name]

    def close(self) -> None:
        """Free what is loaded. Idempotent."""
        with self._lock:
            for model in self._models.values():
                model.close()
            self._models.clear()
            self._embedders.clear()
            self._rerankers.clear()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
