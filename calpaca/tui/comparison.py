"""Side by side: one prompt to two or three set-ups with the same seed, in columns, differences marked."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import Screen
from textual.widgets import Footer, Input, Static

from calpaca.core.context import fit
from calpaca.core.engine import Handle
from calpaca.core.errors import CalpacaError, UsageError
from calpaca.core.events import Result, Step, Token
from calpaca.core.template import Message
from calpaca.plugins.app_run import AppRun, RunningApp, read_run, shared_values
from calpaca.plugins.chat_setup import ChatSetup, preset
from calpaca.plugins.instances import find_instance, instances
from calpaca.plugins.options import flag_name
from calpaca.tui.differences import marked
from calpaca.tui.model_slot import ModelSlot

if TYPE_CHECKING:
    from calpaca.core.runtime import Runtime
    from calpaca.tui.app import ChatApp

_HINT = (
    "Write: /compare base | this, /compare this | adapter=PATH | model=NAME temperature=0.7, a preset's name, "
    "or /compare this | APP file=PATH"
)
_MOST = 3


@dataclass(frozen=True)
class Configuration:
    """What a column asks: a model under a set-up, or an app on it."""

    label: str
    setup: ChatSetup
    app: AppRun | None = None


def configurations(text: str, chat_setup: ChatSetup, runtime: Runtime) -> list[Configuration]:
    """The set-ups of a line, parted by bars. Raises UsageError for one that cannot be, or for too few or many."""
    given = [part.strip() for part in text.split("|")] if text.strip() else []
    if not given and chat_setup.adapters:
        given = ["base", "this"]
    if not 2 <= len(given) <= _MOST or not all(given):
        raise UsageError(f"Side by side stand two or three set-ups; these are {len(given)}.", _HINT)
    return [_configuration(part, chat_setup, runtime) for part in given]


def _configuration(text: str, setup: ChatSetup, runtime: Runtime) -> Configuration:
    first, *rest = shlex.split(text)
    if first in instances(runtime):
        return Configuration(text, setup, _app_run(first, rest, setup, runtime))
    if "=" in first:
        rest.insert(0, first)
    elif first == "base":
        setup = setup.changed({"adapters": []})
    elif first != "this":
        setup = setup.changed(preset(first, runtime.settings))
    for option in rest:
        name, _, value = option.partition("=")
        setup = setup.with_text({"adapter": "adapters"}.get(name, name), value)
    runtime.check(setup.spec())
    setup.sampling(runtime.settings)
    return Configuration(text, setup)


def _app_run(name: str, words: list[str], setup: ChatSetup, runtime: Runtime) -> AppRun:
    """An app with `flag=value` words; a flag may come several times where it takes a list."""
    instance = find_instance(name, runtime)
    model = instance.app.load_options()
    fields = {flag_name(model, field): field for field in model.model_fields}
    options: dict[str, Any] = {}
    for word in words:
        flag, _, value = word.partition("=")
        field = fields.get(flag, flag)
        several = isinstance(model.model_fields[field].default, list | tuple) if field in model.model_fields else False
        options[field] = [*options.get(field, []), value] if several else value
    run = AppRun(name, {**shared_values(setup, model), **options})
    read_run(instance, run)
    return run


def compare(chat: ChatApp, text: str) -> None:
    """Open the columns."""
    chat.refuse_while_answering()
    chat.push_screen(ComparisonScreen(chat, configurations(text, chat.slot.setup, chat.runtime)))


class Column(VerticalScroll):
    """One set-up's answer. `slot` is the chat's own where both have the same model."""

    def __init__(self, chat: ChatApp, configuration: Configuration) -> None:
        super().__init__(classes="column")
        self._chat = chat
        self.configuration = configuration
        shares = configuration.setup.spec() == chat.slot.setup.spec()
        self._is_own = not shares
        self.slot = chat.slot if shares else ModelSlot(chat.slot.host, chat.runtime.settings, configuration.setup)
        self._loads = self._is_own
        self._at_work: Handle | RunningApp | None = None
        self._stopped = False
        self.text = ""

    def compose(self) -> ComposeResult:
        yield Static("", markup=False)

    def on_mount(self) -> None:
        self.border_title = self.configuration.label.replace("[", "\\[")

    def answer(self, messages: list[Message], seed: int) -> None:
        """Ask, in a thread, and show what comes."""
        self.text, self._stopped = "", False
        self._tell("loading" if self._loads else "reading")
        try:
            if self._loads:
                self._loads = False
                self.slot.load()
            if self.configuration.app is not None:
                self._run_app(self.configuration.app, messages)
            else:
                self._ask_model(messages, seed)
        except CalpacaError as error:
            self._loads = self._is_own and self.slot.has_failed
            if self._loads:
                self.slot.close()
            self._tell(f"failed: {error.message} {error.hint}")

    def _ask_model(self, messages: list[Message], seed: int) -> None:
        setup, model = self.configuration.setup, self.slot.wait()
        sampling = replace(setup.sampling(self._chat.runtime.settings), seed=seed)
        fitted = fit(model, messages, setup.context, max_new_tokens=sampling.max_new_tokens)
        handle = self._at_work = model.chat(fitted.messages, sampling)
        for chunk in handle:
            self._grow(chunk.text)
        done = handle.result()
        self._tell(f"{done.usage.completion_tokens} tokens · first after {done.timings.first_token:.1f} s")

    def _run_app(self, run: AppRun, messages: list[Message]) -> None:
        app = find_instance(run.name, self._chat.runtime).app
        running = self._at_work = self.slot.host.run(self.slot.wait(), replace(run, input=messages[-1]["content"]))
        is_last = True
        for event in running:
            match event:
                case Step(name=name, index=index, total=total):
                    is_last = index == total
                    self._tell(name)
                case Token(text=text) if is_last:
                    self._grow(text)
                case Result(value=value):
                    self.text = str(value.get(app.answer, self.text))
                    self._grow("")
        self._tell("done")

    def _grow(self, text: str) -> None:
        self.text += text
        self._from_thread(Text(self.text))

    def _from_thread(self, text: Text) -> None:
        if not self._stopped and self.is_attached:
            self.app.call_from_thread(self.show, text)

    def show(self, text: Text) -> None:
        """Show the answer, or what is there of it."""
        self.query_one(Static).update(text)

    def _tell(self, doing: str) -> None:
        if not self._stopped and self.is_attached:
            self.app.call_from_thread(setattr, self, "border_subtitle", doing.replace("[", "\\["))

    def stop(self) -> None:
        """End the answer in hand."""
        self._stopped = True
        if self._at_work is not None:
            self._at_work.cancel()

    def close(self) -> None:
        """Free a model that is not the chat's."""
        self.stop()
        if self._is_own:
            self.slot.close()


class ComparisonScreen(Screen[None]):
    """Each prompt follows the conversation as it stands; the session itself is not changed."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "leave", "Back")]

    def __init__(self, chat: ChatApp, configurations: list[Configuration]) -> None:
        super().__init__()
        self._chat = chat
        self._configurations = configurations
        self._unfinished = 0

    def compose(self) -> ComposeResult:
        with Horizontal():
            for configuration in self._configurations:
                yield Column(self._chat, configuration)
        yield Input(placeholder="One prompt to all of them. What differs from the first is underlined.")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one(Input).focus()

    @property
    def columns(self) -> list[Column]:
        return list(self.query(Column))

    @property
    def is_done(self) -> bool:
        """Whether no answer is in hand."""
        return not self._unfinished

    @on(Input.Submitted)
    def _send(self, event: Input.Submitted) -> None:
        if self._unfinished or not event.value.strip():
            return
        messages = [*self._chat.session.messages(), {"role": "user", "content": event.value.strip()}]
        seed = self._chat.slot.sampling.seed or 0
        self.query_one(Input).border_title = event.value.strip().replace("[", "\\[")
        self.query_one(Input).value = ""
        self._unfinished = len(self.columns)
        for column in self.columns:
            self._ask(column, messages, seed)

    @work(thread=True)
    def _ask(self, column: Column, messages: list[Message], seed: int) -> None:
        column.answer(messages, seed)
        if self.is_attached:
            self.app.call_from_thread(self._finished)

    def _finished(self) -> None:
        self._unfinished -= 1
        if not self._unfinished:
            for column, text in zip(self.columns, marked([column.text for column in self.columns]), strict=True):
                column.show(text)

    def action_leave(self) -> None:
        self.dismiss()

    def on_unmount(self) -> None:
        for column in self.query(Column):
            column.close()
