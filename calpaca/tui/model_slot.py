"""The model that a chat stands on and how it is run: loaded behind the screen, changed without losing a word."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Protocol

from calpaca.core.engine import Sampling
from calpaca.core.model import Model
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec
from calpaca.plugins.app_run import AppRun, RunningApp
from calpaca.plugins.chat_setup import ChatSetup


class Host(Protocol):
    """Where models are loaded and apps run; see `ModelHost`."""

    def open(self, spec: ModelSpec) -> Model:
        """Load a model and wait for it. Raises CalpacaError."""
        ...

    def run(self, model: Model, run: AppRun) -> RunningApp: ...

    def memory(self, model: Model) -> int | None:
        """Bytes it takes, where that is known."""
        ...


class ModelSlot:
    """One model at a time. `setup` says which, and how it is asked."""

    def __init__(self, host: Host, settings: Settings, setup: ChatSetup) -> None:
        self.host = host
        self.setup = setup
        self._settings = settings
        self._opened: Future[Model] = Future()

    @property
    def sampling(self) -> Sampling:
        return self.setup.sampling(self._settings)

    @property
    def loaded(self) -> Model | None:
        """The model, once it is there."""
        return self._opened.result() if self._opened.done() and self._opened.exception() is None else None

    @property
    def has_failed(self) -> bool:
        return self._opened.done() and self._opened.exception() is not None

    @property
    def memory(self) -> int | None:
        return self.host.memory(self.loaded) if self.loaded is not None else None

    def load(self) -> None:
        """Open the model, for everybody who waits for it. Blocks. Raises what went wrong."""
        wanted = self._opened
        try:
            model = self.host.open(self.setup.spec())
        except Exception as error:
            wanted.set_exception(error)
            raise
        if wanted is not self._opened:  # another one was asked for meanwhile
            model.close()
        wanted.set_result(model)

    def wait(self) -> Model:
        """Block until it is loaded. Raises what `load` raised."""
        return self._opened.result()

    def take(self, setup: ChatSetup) -> bool:
        """Go on with another set-up; whether that is one of another model, which `load` then opens.

        Raises UsageError for a value out of range; the set-up is then as it was.
        """
        setup.sampling(self._settings)
        if setup.spec() == self.setup.spec():
            self.setup = setup
            return False
        self.close()
        self.setup = setup
        return True

    def close(self) -> None:
        """Free the model, or what is being loaded of it; `load` may be called again."""
        model = self.loaded
        self._opened = Future()
        if model is not None:
            model.close()


def described(setup: ChatSetup, model: Model | None) -> Mapping[str, str]:
    """A set-up as a person reads it: each value that is not its default."""
    name = model.name if model is not None else setup.model or "default"
    given = {key: str(value) for key, value in setup.given().items() if key != "system"}
    return {"model": name, **{key: value for key, value in given.items() if key != "model"}}
