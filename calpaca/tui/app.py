"""The chat on the screen: one session, one model that is loaded behind it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from inspect import isawaitable
from typing import Any, ClassVar, Protocol

from textual import on, work
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Static

from calpaca.core.conversation import Conversation
from calpaca.core.errors import CalpacaError, UsageError
from calpaca.core.events import ContextReport, Event, Notice, Progress, Result, Step, Token
from calpaca.core.runtime import Runtime
from calpaca.core.sessions import Session, StoredMessage
from calpaca.plugins.chat_setup import ChatSetup
from calpaca.plugins.instances import instances
from calpaca.tui import app_commands, message_commands
from calpaca.tui.attaching import Attachment, summary
from calpaca.tui.commands import COMMANDS, Command, app_command, parse
from calpaca.tui.completion import Completion
from calpaca.tui.composer import Composer
from calpaca.tui.dialogs import ErrorDialog
from calpaca.tui.model_slot import Host, ModelSlot
from calpaca.tui.status import StatusLine
from calpaca.tui.transcript import MessageView, Transcript


class Turn(Protocol):
    """Something that answers the session's last question: a model, or an app on it."""

    def answer(self) -> Iterable[Event]: ...

    def stop(self) -> None: ...


class BusyError(UsageError):
    """An answer is being written, and the conversation is not changed under it."""


class ChatApp(App[None]):
    """`host` loads the model of `setup` in a thread: one can write and look around before it is there."""

    CSS_PATH = "chat.tcss"
    TITLE = "calpaca"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop"),
        Binding("ctrl+n", "command('new')", "New", id="new"),
        Binding("ctrl+o", "command('sessions')", "Sessions", id="sessions"),
        Binding("ctrl+r", "command('again')", "Again", show=False, id="again"),
        Binding("ctrl+e", "command('edit')", "Edit", show=False, priority=True, id="edit"),
        Binding("ctrl+y", "command('copy')", "Copy", show=False, priority=True, id="copy"),
        Binding("ctrl+t", "command('sources')", "Sources", show=False, priority=True, id="sources"),
        Binding("f1", "command('help')", "Help", id="help"),
        Binding("ctrl+q", "quit", "Quit", id="quit"),
    ]

    class Said(Message):
        """The model said something of the answer in hand."""

        def __init__(self, event: Event) -> None:
            super().__init__()
            self.event = event

    class Ended(Message):
        """The answer in hand is over; `error` is why, where it could not be given."""

        def __init__(self, error: CalpacaError | None = None) -> None:
            super().__init__()
            self.error = error

    class Loaded(Message):
        """The model is there, or could not be loaded."""

        def __init__(self, error: CalpacaError | None = None) -> None:
            super().__init__()
            self.error = error

    def __init__(self, runtime: Runtime, host: Host, session: Session, setup: ChatSetup) -> None:
        super().__init__()
        self.runtime = runtime
        self.sessions = runtime.sessions
        self.session = session
        self.slot = ModelSlot(host, runtime.settings, setup)
        self.app_commands = {name: app_command(name, instance) for name, instance in instances(runtime).items()}
        self.attachments: list[Attachment] = []
        self.is_answering = False
        self._turn: Turn | None = None
        self._editing: int | None = None
        self._before: ChatSetup | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="top", markup=False)
        yield Transcript()
        yield StatusLine()
        yield Completion(self.app_commands)
        yield Composer()
        yield Footer(show_command_palette=False)

    async def on_mount(self) -> None:
        self._load_model()
        await self.show_session()
        self.composer.focus()

    def on_unmount(self) -> None:
        self.sessions.discard_empty(self.session.id)

    @property
    def composer(self) -> Composer:
        return self.query_one(Composer)

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    @property
    def status(self) -> StatusLine:
        return self.query_one(StatusLine)

    def tell(self, error: CalpacaError) -> None:
        """Show what went wrong and what to do next; the chat goes on."""
        self.push_screen(ErrorDialog(error.message, error.hint))

    # The model -----------------------------------------------------------------------------------------------------
    def change(self, setup: ChatSetup) -> None:
        """Hold the conversation with another set-up from now on. Raises UsageError for one that cannot be."""
        self.refuse_while_answering()
        before = self.slot.setup
        if self.slot.take(setup):
            self._before = self._before or before
            self._load_model()
        self._keep_setup()
        self.show_top()

    def _keep_setup(self) -> None:
        """Keep the set-up with the session, whose system text stays its own."""
        own = {name: value for name, value in self.session.record.setup.items() if name == "system"}
        given = {name: value for name, value in self.slot.setup.given().items() if name != "system"}
        self.session.set_up({**given, **own})

    def _load_model(self) -> None:
        self.status.load()
        self._open_model()

    @work(thread=True, group="load")
    def _open_model(self) -> None:
        try:
            self.slot.load()
        except CalpacaError as error:
            self.post_message(self.Loaded(error))
        else:
            self.post_message(self.Loaded())

    def on_chat_app_loaded(self, event: Loaded) -> None:
        before, self._before = self._before, None
        if event.error is not None:
            self.status.failed()
            self.tell(event.error)
            if before is not None and not self.is_answering:  # what was there still can be had
                self.change(before)
                self._before = None
        elif not self.is_answering:
            self.status.ready()
        self.show_top()

    def close_model(self) -> None:
        """Free the model, if it was loaded."""
        self.slot.close()

    # What is written -----------------------------------------------------------------------------------------------
    @on(Composer.Sent)
    async def _take(self, event: Composer.Sent) -> None:
        try:
            command = parse(event.text, self.app_commands)
        except UsageError as error:
            self.notify(error.hint, title=error.message, severity="warning", markup=False)
            return
        if command is None:
            text = event.text.removeprefix("/") if event.text.startswith("//") else event.text
            await self._obey(_SAY, text)
            return
        self.composer.clear()
        if not await self._obey(*command) and not self.composer.text:
            self.composer.write(event.text)  # nothing that was typed is lost

    async def _obey(self, command: Command, rest: str = "") -> bool:
        """Whether the command could be obeyed; why not is told."""
        try:
            done = command.run(self, rest)
            if isawaitable(done):
                await done
        except BusyError as error:
            self.notify(error.message, severity="warning", markup=False)
            return False
        except CalpacaError as error:
            self.tell(error)
            return False
        return True

    async def action_command(self, name: str) -> None:
        """Do what a command does that needs nothing after it."""
        if len(self.screen_stack) == 1:
            await self._obey(COMMANDS[name])

    def refuse_while_answering(self) -> None:
        """Raise BusyError while an answer is being written."""
        if self.is_answering:
            raise BusyError("An answer is being written; Escape stops it.")

    @on(Composer.Changed, "#composer")
    def _complete(self) -> None:
        self.query_one(Completion).match(self.composer.text)

    # Questions and answers -----------------------------------------------------------------------------------------
    async def say(self, text: str, metadata: dict[str, Any] | None = None) -> None:
        """Put a question, or the edited one, and have it answered. `metadata` is kept with it."""
        self.refuse_while_answering()
        self.composer.accept(text)
        if self._editing is not None:
            edited, self._editing = self._editing, None
            message = self.session.edit(edited, text)
            self._mark_editing()
            await self.show_session()
        else:
            attached = [{"name": each.name, "text": each.text, "tokens": each.tokens} for each in self.attachments]
            self.attachments.clear()
            self.show_attachments()
            message = self.session.add(
                "user", text, {**(metadata or {}), **({"attachments": attached} if attached else {})}
            )
            await self.transcript.add(message)
        if message.role == "user":
            self._answer()

    def _answer(self) -> None:
        self.is_answering = True
        if self.slot.has_failed:
            self.slot.close()  # perhaps it can be loaded now
            self._open_model()
        self.status.waiting(loaded=self.slot.loaded is not None)
        self._run_answer()

    @work(thread=True, group="answer")
    def _run_answer(self) -> None:
        try:
            turn = self._begin_turn()
            if not self.is_answering:  # stopped before the model was there
                self.post_message(self.Ended())
                return
            self._turn = turn
            for event in turn.answer():
                self.post_message(self.Said(event))
        except CalpacaError as error:
            self.post_message(self.Ended(error))
        else:
            self.post_message(self.Ended())

    def _begin_turn(self) -> Turn:
        """Wait for the model, and have it or an app on it answer the last question."""
        model, question = self.slot.wait(), self.session.path()[-1]
        if "app" in question.metadata:
            return app_commands.turn(self, question, model)
        return Conversation(self.session, model, self.slot.sampling, self.slot.setup.context)

    @property
    def _is_shown(self) -> bool:
        """False when the program is being left: what an answer in hand still says is kept, but has no place to stand."""
        return bool(self.screen_stack) and bool(self.screen_stack[0].query(Transcript))

    async def on_chat_app_said(self, message: Said) -> None:
        if not self._is_shown:
            return
        match message.event:
            case Token(text=text):
                await self._grow(text)
            case Notice(text=text):
                self.notify(text, markup=False)
            case Step() | Progress() as event:
                self.status.working(event)
            case ContextReport(use=use):
                self.status.use = use
            case Result(value=value):
                self.status.answered(value)

    async def _grow(self, text: str) -> None:
        begun = self.transcript.is_growing
        self.status.writing()
        await self.transcript.grow(text, None if begun else self.session.path()[-1])

    async def on_chat_app_ended(self, ended: Ended) -> None:
        if not self._is_shown:
            return
        await self.transcript.end_answer()
        self.is_answering, self._turn = False, None
        path = self.session.path()
        if ended.error is not None and path and path[-1].role == "user":
            await self._give_back(path[-1])
        elif path:
            await self.transcript.settle(path[-1], self._places(path)[path[-1].id])
        if ended.error is not None:
            self.status.failed()
            self.tell(ended.error)
        else:
            self.status.ready()
        self.status.memory = self.slot.memory
        self.show_top()

    async def _give_back(self, question: StoredMessage) -> None:
        """A question without a word of an answer goes back to where it was written."""
        self.session.go_to(question.parent)
        await self.show_session()
        attached = question.metadata.get("attachments", ())
        self.attachments = [Attachment(**each) for each in attached] or self.attachments
        self.show_attachments()
        if not self.composer.text:
            app = question.metadata.get("app")
            self.composer.write(f"/{app['name']} {app['input']}".strip() if app else question.content)

    async def answer_again(self, question: StoredMessage) -> None:
        """Another answer beside those that a question has."""
        self.refuse_while_answering()
        self.session.go_to(question.id)
        await self.show_session()
        self._answer()

    def edit(self, message: StoredMessage) -> None:
        """Take a message back into the composer; sent, it begins a branch."""
        self.refuse_while_answering()
        self._editing = message.id
        self.composer.write(message.content)
        self._mark_editing()
        self.composer.focus()

    def _mark_editing(self) -> None:
        self.composer.border_title = "Editing: Enter makes a branch, Escape leaves" if self._editing is not None else ""

    def show_attachments(self) -> None:
        """Say under the composer what goes with the next question."""
        attached = f"with {summary(self.attachments)}" if self.attachments else ""
        self.composer.border_subtitle = attached.replace("[", "\\[")

    # Sessions ------------------------------------------------------------------------------------------------------
    async def open(self, session: Session) -> None:
        """Go on with another session, with the model that is there. One in which nothing was said is not kept."""
        self.refuse_while_answering()
        self.sessions.discard_empty(self.session.id)
        self.session, self._editing = session, None
        self.slot.setup = self.slot.setup.changed({"system": session.record.setup.get("system")})
        self._mark_editing()
        self.status.use = None
        self.status.ready()
        await self.show_session()
        self.composer.focus()

    async def show_session(self) -> None:
        """Show the conversation as it stands."""
        path = self.session.path()
        await self.transcript.show(path, self._places(path), self._system_text(path))
        self.composer.remember([message.content for message in path if message.role == "user"])
        self.show_top()

    def _system_text(self, path: list[StoredMessage]) -> str | None:
        """The set-up's, where no message of the session holds it."""
        if path and path[0].role == "system":
            return None
        return self.session.record.setup.get("system") or None

    def _places(self, path: Iterable[StoredMessage]) -> dict[int, tuple[int, int]]:
        """For each message, which of its siblings it is, and how many there are."""
        children: dict[int | None, list[int]] = {}
        for message in self.session.tree():
            children.setdefault(message.parent, []).append(message.id)
        return {
            message.id: (children[message.parent].index(message.id) + 1, len(children[message.parent]))
            for message in path
        }

    def show_top(self) -> None:
        """The model and the title."""
        model = self.slot.loaded
        name = model.name if model is not None else "no model yet"
        self.query_one("#top", Static).update(f"{name}  ·  {self.session.record.title or 'New session'}")

    # Keys ----------------------------------------------------------------------------------------------------------
    async def action_stop(self) -> None:
        """End the answer in hand; without one, give up editing and go back to writing."""
        if self.is_answering:
            if self._turn is not None:
                self._turn.stop()
            else:
                self.is_answering = False  # the model is not there yet
                self.status.load()
            return
        if self._editing is not None:
            self._editing = None
            self.composer.clear()
            self._mark_editing()
        self.composer.focus()

    @on(MessageView.Wish)
    async def _grant(self, event: MessageView.Wish) -> None:
        await self._obey(
            Command(lambda chat, wish: message_commands.grant(chat, wish, event.message_id), ""), event.wish
        )

    @on(MessageView.Cited)
    def _show_citation(self, event: MessageView.Cited) -> None:
        message_commands.show_sources(self, event.message, event.number)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The slash commands that need nothing after them, beside Textual's own."""
        yield from super().get_system_commands(screen)
        for name, command in {**COMMANDS, **self.app_commands}.items():
            if not command.needs_text and name not in {"quit", "help"}:
                yield SystemCommand(f"/{name}", command.sentence, lambda command=command: self._obey(command))

    async def action_quit(self) -> None:
        if self._turn is not None:
            self._turn.stop()
        self.exit()


_SAY = Command(ChatApp.say, "Ask the model.", "TEXT")


def has_screen() -> bool:
    """Whether standard input and output are a terminal that a full screen can be drawn on, or a browser's."""
    if "web_driver" in os.environ.get("TEXTUAL_DRIVER", ""):  # textual-serve is at the other end
        return True
    return os.isatty(0) and os.isatty(1) and os.environ.get("TERM", "") not in {"", "dumb"}
