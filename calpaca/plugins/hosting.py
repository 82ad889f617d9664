"""A model in a process of its own: the screen of its user never stands still for it, and its crash is a message.

The process has a runtime of its own, with the same settings and plugins. It renders conversations and counts their tokens,
so that the caller needs neither the model's libraries nor its tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Literal

from calpaca.core.engine import Capabilities, Chunk, Conversation, Handle, Request, refuse_unsupported
from calpaca.core.engines.process import Event, Worker
from calpaca.core.errors import ModelError
from calpaca.core.model import Model
from calpaca.core.spec import ModelSpec
from calpaca.core.template import ChatTemplate, no_template

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
        self._handles: dict[int, Handle] = {}
        self._said: SimpleQueue[Event] = SimpleQueue()

    @property
    def busy(self) -> bool:
        return bool(self._handles) or not self._said.empty()

    def start(self, key: int, job: _Call | Request) -> None:
        if isinstance(job, _Call):
            self._said.put((key, self._called(job), True))
            return
        handle = self._submitted(job)
        self._handles[key] = handle
        Thread(target=self._pass_on, args=[key, handle], daemon=True).start()

    def cancel(self, key: int) -> None:
        handle = self._handles.get(key)
        if handle is not None:
            handle.cancel()

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

    def _pass_on(self, key: int, handle: Handle) -> None:
        try:
            for chunk in handle:
                self._said.put((key, chunk, chunk.finish_reason is not None))
        except Exception as error:
            self._said.put((key, error, True))
