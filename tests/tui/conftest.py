"""A chat whose engine is the test kit's, and what a person does with it."""

from collections.abc import Callable, Iterator

import pytest
from textual.widgets import Markdown, Static

from calpaca.core.events import Event
from calpaca.core.model import Model
from calpaca.core.sessions import Sessions
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec
from calpaca.plugins.app_run import AppRun, app_events
from calpaca.plugins.chat_setup import ChatSetup
from calpaca.testing import FakeRuntime, fake_model, fake_runtime
from calpaca.tui.app import ChatApp
from calpaca.tui.transcript import MessageView


class FakeHost:
    """Opens what `load` gives, and runs apps in this process. `opened` are the specs that were asked for."""

    def __init__(self, runtime: FakeRuntime, load: Callable[[], Model] | None) -> None:
        self.runtime = runtime
        self.model = runtime.fake
        self.opened: list[ModelSpec] = []
        self._load = load

    def open(self, spec: ModelSpec) -> Model:
        self.opened.append(spec)
        if self._load is not None:
            return self._load()
        return _Lasting(str(spec) if spec.model else "fake", spec, self.model.engine, self.model.template)

    def run(self, _model: Model, run: AppRun) -> "_Running":
        return _Running(app_events(run, self.runtime))

    def memory(self, _model: Model) -> int | None:
        return 1_200_000_000


class _Lasting(Model):
    """Its engine is all models', and outlives each."""

    def close(self) -> None:
        pass


class _Running:
    def __init__(self, events) -> None:
        self._events = events
        self._stopped = False

    def __iter__(self) -> Iterator[Event]:
        for event in self._events:
            if self._stopped:
                return
            yield event

    def cancel(self) -> None:
        self._stopped = True


@pytest.fixture(scope="session")
def registries(tmp_path_factory):
    """The installed plugins, found once."""
    return fake_runtime([], settings=Settings())


@pytest.fixture
def runtime(registries, tmp_path, monkeypatch) -> FakeRuntime:
    """A runtime with its own settings file and sessions."""
    monkeypatch.setenv("CALPACA_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("CALPACA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    fresh = FakeRuntime(fake_model([]), registries.fake_embedder, Settings())
    for registry in ("engines", "sources", "loaders", "stores", "apps", "plugins"):
        setattr(fresh, registry, getattr(registries, registry))
    return fresh


@pytest.fixture
def sessions(runtime) -> Sessions:
    return runtime.sessions


@pytest.fixture
def chat(runtime, sessions) -> Callable[..., ChatApp]:
    """`chat(answers, max_new_tokens=…)` is a chat with a scripted model; `setup` names are those of ChatSetup."""

    def make(answers=None, *, load=None, session=None, delay=0.0, context_length=32_768, **setup) -> ChatApp:
        runtime.fake = fake_model(answers, delay=delay, context_length=context_length)
        return ChatApp(runtime, FakeHost(runtime, load), session or sessions.new({}), ChatSetup(**setup))

    return make


async def _until(pilot, holds: Callable[[], bool]) -> None:
    for _ in range(500):
        await pilot.pause(0.01)
        if holds():
            return
    raise AssertionError("it did not come about")


@pytest.fixture
def until():
    """`await until(pilot, lambda: …)` waits until it holds."""
    return _until


@pytest.fixture
def ask():
    """Write and send; wait for the answer."""

    async def run(pilot, text: str) -> None:
        app = pilot.app
        app.composer.text = text
        await pilot.press("enter")
        await _until(pilot, lambda: not app.composer.text or len(app.screen_stack) > 1)
        await _until(pilot, lambda: not app.is_answering)
        await pilot.pause()

    return run


@pytest.fixture
def command():
    """Write and send a command; wait until it did what it does."""

    async def run(pilot, text: str, holds: Callable[[], bool]) -> None:
        pilot.app.composer.text = text
        await pilot.press("enter")
        await _until(pilot, holds)

    return run


@pytest.fixture
def shown():
    """What stands on the screen, message by message."""

    def read(app) -> list[str]:
        texts = []
        for view in app.query(MessageView):
            markdown = view.query(Markdown)
            if not view.children:  # it has its place, and is not filled yet
                continue
            texts.append(markdown.first().source if markdown else str(view.query_one(Static).content))
        return texts

    return read


@pytest.fixture
def titles():
    """The titles of the messages on the screen."""
    return lambda app: [str(view.border_title) for view in app.query(MessageView)]
