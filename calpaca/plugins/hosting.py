"""A model in a process of its own: the screen of its user never stands still for it, and its crash is a message.

The process has a runtime of its own, with the same settings and plugins. It renders conversations and counts their tokens,
so that the caller needs neither the model's libraries nor its tokenizer. Apps are run there too, on the same model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

from calpaca.core.engine import Capabilities, Chunk, Conversation, Handle, Request, refuse_unsupported
from calpaca.core.engines.process import Event, Worker
from calpaca.core.errors import CalpacaError, ModelError
from calpaca.core.model import Model
from calpaca.core.spec import ModelSpec
from calpaca.core.template import ChatTemplate, no_template
from calpaca.plugins.app_run import AppRun, app_events

if TYPE_CHECKING:
    from calpaca.core import events

_STEP = 0.02
"""Seconds for which the process waits for a word of the model before it looks at the pipe again."""


@dataclass(frozen=True)
class _Call:
    """A method of the hosted model's engine, to be called there."""

    method: Literal["describe", "count_tokens", "encode", "decode"]
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class HostedEngine:
    """An engine whose model is loaded in a child process, which is started again after a crash. See `Engine`."""

    name = "hosted"
    template: ChatTemplate = no_template()  # conversations are rendered where the model is

    def __init__(self, spec: ModelSpec, *, attaches: bool) -> None:
        arguments = {"spec": spec.model_dump(mode="json"), "attaches": attaches}
        self.worker = Worker(f"{__name__}:ModelRunner", arguments, f"The process of {spec.model or 'the model'}")
        self._capabilities: Capabilities | None = None

    def open(self) -> None:
        """Wait until the model is loaded. Raises ModelError."""
        self.worker.open()
        self._capabilities = self._ask(_Call("describe"))

    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            self.open()
        assert self._capabilities is not None
        return self._capabilities

    def submit(self, request: Request) -> Handle:
        refuse_unsupported(self.name, self.capabilities(), request)
        key = self.worker.new_key()
        handle = Handle(lambda: self.worker.cancel(key))
        self.worker.start(key, request, _Chunks(handle))
        return handle

    def run_app(self, run: AppRun) -> HostedApp:
        """Run an app where the model is."""
        key = self.worker.new_key()
        running = HostedApp(lambda: self.worker.cancel(key))
        self.worker.start(key, run, _Events(running))
        return running

    def count_tokens(self, conversation: Conversation) -> int:
        return int(self._ask(_Call("count_tokens", (conversation.messages, conversation.tools))))

    def encode(self, text: str | tuple[str, ...], *, special_tokens: bool = False) -> list[int]:
        return list(self._ask(_Call("encode", (text,), {"special_tokens": special_tokens})))

    def decode(self, token_ids: list[int]) -> str:
        return str(self._ask(_Call("decode", (token_ids,))))

    def close(self) -> None:
        self.worker.close()

    def _ask(self, call: _Call) -> Any:
        reply = _Reply()
        self.worker.start(self.worker.new_key(), call, reply)
        return reply.future.result()


def host(spec: ModelSpec, *, attaches: bool) -> Model:
    """Load a model in a child process, and wait for it. `attaches`: one that a running server has loaded is asked there.

    Raises ModelError.
    """
    engine = HostedEngine(spec, attaches=attaches)
    try:
        engine.open()
    except BaseException:
        engine.close()
        raise
    return Model(str(engine.capabilities().details["model"]), spec, engine, engine.template)


class ModelHost:
    """Gives a chat its models, each in a process of its own, and runs apps on them."""

    def __init__(self, *, attaches: bool) -> None:
        self._attaches = attaches

    def open(self, spec: ModelSpec) -> Model:
        """As `host`."""
        return host(spec, attaches=self._attaches)

    def run(self, model: Model, run: AppRun) -> HostedApp:
        """Run an app in the process of a model that was opened here."""
        assert isinstance(model.engine, HostedEngine)
        return model.engine.run_app(run)

    def memory(self, model: Model) -> int | None:
        """Bytes that the process of a model holds in memory; None where that cannot be told."""
        pid = model.engine.worker.pid if isinstance(model.engine, HostedEngine) else None
        return resident_bytes(pid) if pid is not None else None


def resident_bytes(pid: int) -> int | None:
    """Memory of a process without what is swapped out; None where the system has no `/proc`."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class _Ended:
    """An app has said all it had to say."""


class HostedApp:
    """What an app in the process reports; see `RunningApp`."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._said: SimpleQueue[events.Event | Exception | _Ended] = SimpleQueue()

    def __iter__(self) -> Iterator[events.Event]:
        while not isinstance(event := self._said.get(), _Ended):
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self) -> None:
        self._cancel()

    def put(self, event: events.Event | Exception | _Ended) -> None:
        """Say this next."""
        self._said.put(event)


class _Events:
    """Puts what comes from the process into a running app."""

    def __init__(self, running: HostedApp) -> None:
        self._running = running

    def take(self, payload: events.Event | _Ended) -> None:
        self._running.put(payload)

    def fail(self, error: Exception) -> None:
        self._running.put(error)

    def cancel(self) -> None:
        self._running.put(_Ended())


class _Chunks:
    """Puts what comes from the process into a handle."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def take(self, payload: Chunk) -> None:
        self._handle.put(payload)

    def fail(self, error: Exception) -> None:
        self._handle.fail(error)

    def cancel(self) -> None:
        self._handle.put(Chunk("", finish_reason="cancelled"))


class _Reply:
    """Waits for the answer to a call."""

    def __init__(self) -> None:
        self.future: Future[Any] = Future()

    def take(self, payload: Any) -> None:
        self.future.set_result(payload)

    def fail(self, error: Exception) -> None:
        self.future.set_exception(error)

    def cancel(self) -> None:
        self.future.set_exception(ModelError("The engine is closed.", "Load the model again."))


# In the process ----------------------------------------------------------------------------------------------------


class ModelRunner:
    """Runs a model for the other end of the pipe; see `Runner`."""

    def __init__(self, spec: Mapping[str, Any], *, attaches: bool) -> None:
        from calpaca.plugins.wiring import runtime

        own = runtime()
        own.attaches = attaches
        self._model = own.model(ModelSpec.model_validate(spec))
        self._runtime = own
        self._handles: dict[int, Handle] = {}
        self._apps: dict[int, threading.Event] = {}
        self._said: SimpleQueue[Event] = SimpleQueue()

    @property
    def busy(self) -> bool:
        return bool(self._handles or self._apps) or not self._said.empty()

    def start(self, key: int, job: _Call | Request | AppRun) -> None:
        if isinstance(job, _Call):
            self._said.put((key, self._called(job), True))
            return
        if isinstance(job, AppRun):
            self._apps[key] = threading.Event()
            Thread(target=self._run_app, args=[key, job, self._apps[key]], daemon=True).start()
            return
        handle = self._submitted(job)
        self._handles[key] = handle
        Thread(target=self._pass_on, args=[key, handle], daemon=True).start()

    def cancel(self, key: int) -> None:
        handle = self._handles.get(key)
        if handle is not None:
            handle.cancel()
        if key in self._apps:
            self._apps[key].set()

    def step(self) -> list[Event]:
        events: list[Event] = []
        try:
            events.append(self._said.get(timeout=_STEP))
            while True:
                events.append(self._said.get_nowait())
        except Empty:
            pass
        for key, _, last in events:
            if last:
                self._handles.pop(key, None)
                self._apps.pop(key, None)
        return events

    def close(self) -> None:
        self._model.close()

    def _called(self, call: _Call) -> Any:
        methods: dict[str, Callable[..., Any]] = {
            "describe": self._described,
            "count_tokens": self._model.count_tokens,
            "encode": self._model.engine.encode,
            "decode": self._model.engine.decode,
        }
        return methods[call.method](*call.arguments, **call.options)

    def _described(self) -> Capabilities:
        capabilities = self._model.engine.capabilities()
        details = {"model": self._model.name, "engine": self._model.engine.name, "fingerprint": self._model.fingerprint}
        return replace(capabilities, conversations=True, details={**capabilities.details, **details})

    def _submitted(self, request: Request) -> Handle:
        asked: Conversation | None = request.conversation
        if asked is None:
            return self._model.engine.submit(request)
        messages: Sequence[Mapping[str, Any]] = asked.messages
        return self._model.chat(messages, request.sampling, tools=asked.tools, grammar=request.grammar)

    def _run_app(self, key: int, run: AppRun, cancelled: threading.Event) -> None:
        try:
            with closing(app_events(run, self._runtime)) as reported:
                for event in reported:
                    if cancelled.is_set():
                        break
                    self._said.put((key, event, False))
            self._said.put((key, _Ended(), True))
        except Exception as error:
            self._said.put((key, _told(run.name, error), True))

    def _pass_on(self, key: int, handle: Handle) -> None:
        try:
            for chunk in handle:
                self._said.put((key, chunk, chunk.finish_reason is not None))
        except Exception as error:
            self._said.put((key, error, True))


def _told(app: str, error: Exception) -> CalpacaError:
    """An error of ours as it is; any other one as that of the app, which a person can read."""
    if isinstance(error, CalpacaError):
        return error
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return ModelError(f"The app '{app}' failed: {said}", "See: calpaca plugins")
