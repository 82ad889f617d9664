"""The chat on the screen: one session, one model that is loaded behind it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from inspect import isawaitable
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, Static

from calpaca.core.context import ContextPolicy
from calpaca.core.conversation import Conversation
from calpaca.core.engine import Sampling
from calpaca.core.errors import CalpacaError, UsageError
from calpaca.core.events import ContextReport, Event, Notice, Result, Token
from calpaca.core.model import Model
from calpaca.core.session_export import exported, imported
from calpaca.core.sessions import Session, Sessions, StoredMessage
from calpaca.tui.commands import COMMANDS, Command, parse
from calpaca.tui.composer import Composer
from calpaca.tui.dialogs import ErrorDialog, TextDialog
from calpaca.tui.help_screen import HelpScreen
from calpaca.tui.session_list import SessionList
from calpaca.tui.status import StatusLine
from calpaca.tui.transcript import MessageView, Transcript


class ChatApp(App[None]):
    """`load` gives the model, and is called in a thread: one can write and look around before it is there."""

    CSS_PATH = "chat.tcss"
    TITLE = "calpaca"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop"),
        Binding("ctrl+n", "new", "New"),
        Binding("ctrl+o", "sessions", "Sessions"),
        Binding("ctrl+r", "again", "Again", show=False),
        Binding("ctrl+e", "edit", "Edit", show=False, priority=True),
        Binding("ctrl+y", "copy", "Copy", show=False, priority=True),
        Binding("f1", "help", "Help"),
        Binding("ctrl+q", "quit", "Quit"),
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

    def __init__(
        self, sessions: Sessions, session: Session, load: Callable[[], Model], sampling: Sampling, policy: ContextPolicy
    ) -> None:
        super().__init__()
        self.sessions = sessions
        self.session = session
        self._load = load
        self._sampling = sampling
        self._policy: ContextPolicy = policy
        self._model: Future[Model] = Future()
        self._conversation: Conversation | None = None
        self._answering = False
        self._editing: int | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="top", markup=False)
        yield Transcript()
        yield StatusLine()
        yield Composer()
        yield Footer(show_command_palette=False)

    async def on_mount(self) -> None:
        self.status.load()
        self._load_model()
        await self._show_session()
        self.composer.focus()

    @property
    def composer(self) -> Composer:
        return self.query_one(Composer)

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    @property
    def status(self) -> StatusLine:
        return self.query_one(StatusLine)

    # The model -----------------------------------------------------------------------------------------------------
    @work(thread=True, group="load")
    def _load_model(self) -> None:
        wanted = self._model
        try:
            wanted.set_result(self._load())
        except CalpacaError as error:
            wanted.set_exception(error)
            self.post_message(self.Loaded(error))
        else:
            self.post_message(self.Loaded())

    def on_chat_app_loaded(self, event: Loaded) -> None:
        self._show_top()
        if event.error is not None:
            self.status.failed()
            self.push_screen(ErrorDialog(event.error.message, event.error.hint))
        elif not self._answering:
            self.status.ready()

    def _loaded_model(self) -> Model | None:
        return self._model.result() if self._model.done() and self._model.exception() is None else None

    def close_model(self) -> None:
        """Free the model, if it was loaded."""
        if (model := self._loaded_model()) is not None:
            model.close()

    # Questions and answers -----------------------------------------------------------------------------------------
    @on(Composer.Sent)
    async def _take(self, event: Composer.Sent) -> None:
        try:
            command = parse(event.text)
        except UsageError as error:
            self.notify(error.hint, title=error.message, severity="warning", markup=False)
            return
        if command is not None:
            self.composer.clear()
            await self._obey(*command)
            return
        await self._ask(event.text.removeprefix("/") if event.text.startswith("//") else event.text)

    async def _obey(self, command: Command, rest: str) -> None:
        action = getattr(self, f"action_{command.action}")
        done = action(rest) if command.takes else action()
        if isawaitable(done):
            await done

    async def _ask(self, text: str) -> None:
        if self._answering:
            self.notify("An answer is being written; Escape stops it.", severity="warning")
            return
        self.composer.accept(text)
        if self._editing is None:
            await self.transcript.add(self.session.add("user", text))
            self._answer()
            return
        edited, self._editing = self._editing, None
        message = self.session.edit(edited, text)
        self._mark_editing()
        await self._show_session()
        if message.role == "user":
            self._answer()

    def _answer(self) -> None:
        self._answering = True
        self.status.waiting(loaded=self._model.done())
        if self._model.done() and self._model.exception() is not None:
            self._model = Future()  # it could not be loaded; perhaps it can be now
            self._load_model()
        self._run_answer()

    @work(thread=True, group="answer")
    def _run_answer(self) -> None:
        try:
            conversation = Conversation(self.session, self._model.result(), self._sampling, self._policy)
            if not self._answering:  # stopped before the model was there
                self.post_message(self.Ended())
                return
            self._conversation = conversation
            for event in conversation.answer():
                self.post_message(self.Said(event))
        except CalpacaError as error:
            self.post_message(self.Ended(error))
        else:
            self.post_message(self.Ended())

    @property
    def _is_shown(self) -> bool:
        """False when the program is being left: what an answer in hand still says is kept, but has no place to stand."""
        return bool(self.query(Transcript))

    async def on_chat_app_said(self, message: Said) -> None:
        if not self._is_shown:
            return
        match message.event:
            case Token(text=text):
                await self._grow(text)
            case Notice(text=text):
                self.notify(text, markup=False)
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
        self._answering, self._conversation = False, None
        path = self.session.path()
        if ended.error is not None and path and path[-1].role == "user":
            await self._give_back(path[-1])
        elif path:
            self.transcript.settle(path[-1], self._places(path)[path[-1].id])
        if ended.error is not None:
            self.status.failed()
            self.push_screen(ErrorDialog(ended.error.message, ended.error.hint))
        else:
            self.status.ready()
        self._show_top()

    async def _give_back(self, question: StoredMessage) -> None:
        """A question without a word of an answer goes back to where it was written."""
        self.session.go_to(question.parent)
        await self._show_session()
        if not self.composer.text:
            self.composer.text = question.content

    # Sessions ------------------------------------------------------------------------------------------------------
    async def _show_session(self) -> None:
        path = self.session.path()
        await self.transcript.show(path, self._places(path))
        self.composer.remember([message.content for message in path if message.role == "user"])
        self._show_top()

    def _places(self, path: Iterable[StoredMessage]) -> dict[int, tuple[int, int]]:
        """For each message, which of its siblings it is, and how many there are."""
        children: dict[int | None, list[int]] = {}
        for message in self.session.tree():
            children.setdefault(message.parent, []).append(message.id)
        return {
            message.id: (children[message.parent].index(message.id) + 1, len(children[message.parent]))
            for message in path
        }

    def _show_top(self) -> None:
        model = self._loaded_model()
        name = model.name if model is not None else "no model yet"
        self.query_one("#top", Static).update(f"{name}  ·  {self.session.record.title or 'New session'}")

    async def _open(self, session: Session) -> None:
        if self._answering:
            self.notify("An answer is being written; Escape stops it.", severity="warning")
            return
        self.session, self._editing = session, None
        self._mark_editing()
        self.status.use = None
        self.status.ready()
        await self._show_session()
        self.composer.focus()

    async def action_new(self) -> None:
        """Begin a new session with the set-up of this one."""
        if self.session.head is not None:
            await self._open(self.sessions.new(self.session.record.setup))

    @work
    async def action_sessions(self) -> None:
        chosen = await self.push_screen_wait(SessionList(self.sessions))
        if chosen is not None:
            await self._open(self.sessions.find(chosen))
        else:
            await self._open_another_if_gone()

    async def _open_another_if_gone(self) -> None:
        if all(record.id != self.session.id for record in self.sessions.records()):
            await self._open(self.sessions.new({}))
        self._show_top()

    async def action_system(self, text: str) -> None:
        if self.session.head is not None:
            self.notify("The session has begun; /new begins another.", severity="warning")
            return
        await self.transcript.add(self.session.add("system", text))

    async def action_fork(self) -> None:
        await self._open(self.session.fork())

    @work
    async def action_rename(self, title: str | None = None) -> None:
        wanted = title or await self.push_screen_wait(TextDialog("Title", self.session.record.title))
        if wanted is not None:
            self.session.rename(wanted)
            self._show_top()

    def action_export(self, file: str) -> None:
        path = Path(file).expanduser()
        try:
            text = exported(self.session, path.suffix)
            with path.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except CalpacaError as error:
            self.push_screen(ErrorDialog(error.message, error.hint))
        except OSError as error:
            self.push_screen(ErrorDialog(f"{path} cannot be written: {error.strerror}.", "Name another file."))
        else:
            self.notify(f"Written to {path}.", markup=False)

    async def action_import(self, file: str) -> None:
        try:
            sessions = imported(self.sessions, Path(file).expanduser())
        except CalpacaError as error:
            self.push_screen(ErrorDialog(error.message, error.hint))
            return
        self.notify(f"{len(sessions)} sessions read.")
        await self._open(sessions[-1])

    # Messages ------------------------------------------------------------------------------------------------------
    def _last(self, role: str) -> StoredMessage | None:
        return next((message for message in reversed(self.session.path()) if message.role == role), None)

    async def action_stop(self) -> None:
        """End the answer in hand; without one, give up editing and go back to writing."""
        if self._answering:
            if self._conversation is not None:
                self._conversation.stop()
            else:
                self._answering = False  # the model is not there yet
                self.status.load()
            return
        if self._editing is not None:
            self._editing = None
            self.composer.clear()
            self._mark_editing()
        self.composer.focus()

    async def action_again(self) -> None:
        question = self._last("user")
        if question is not None:
            await self._answer_again(question)

    async def _answer_again(self, question: StoredMessage) -> None:
        if self._answering:
            self.notify("An answer is being written; Escape stops it.", severity="warning")
            return
        self.session.go_to(question.id)
        await self._show_session()
        self._answer()

    def action_edit(self) -> None:
        question = self._last("user")
        if question is not None:
            self._edit(question)

    def _edit(self, message: StoredMessage) -> None:
        if not self._answering:
            self._editing = message.id
            self.composer.text = message.content
            self.composer.move_cursor(self.composer.document.end)
            self._mark_editing()
            self.composer.focus()

    def _mark_editing(self) -> None:
        self.composer.border_title = "Editing: Enter makes a branch, Escape leaves" if self._editing is not None else ""

    def action_copy(self) -> None:
        answer = self._last("assistant")
        if answer is not None:
            self._copy(answer)

    def _copy(self, message: StoredMessage) -> None:
        self.copy_to_clipboard(message.content)
        self.notify("Copied.")

    @on(MessageView.Wish)
    async def _grant(self, event: MessageView.Wish) -> None:
        """What a focused message was told."""
        path = self.session.path()
        message = next((each for each in path if each.id == event.message_id), None)
        if message is None:
            return
        match event.wish:
            case "edit":
                self._edit(message)
            case "copy":
                self._copy(message)
            case "again":
                asked = message if message.role == "user" else path[max(path.index(message) - 1, 0)]
                await self._answer_again(asked)
            case "earlier":
                await self._walk(message, -1)
            case "later":
                await self._walk(message, +1)

    async def _walk(self, message: StoredMessage, step: int) -> None:
        """Show the branch beside a message's."""
        siblings = [each.id for each in self.session.siblings(message.id)]
        place = siblings.index(message.id) + step
        if self._answering or not 0 <= place < len(siblings):
            return
        self.session.walk_to(siblings[place])
        await self._show_session()
        try:
            self.query_one(f"#message-{siblings[place]}", MessageView).focus()
        except NoMatches:
            self.composer.focus()

    def action_help(self) -> None:
        self.push_screen(HelpScreen())

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The slash commands that need nothing after them, beside Textual's own."""
        yield from super().get_system_commands(screen)
        for name, command in COMMANDS.items():
            if not command.takes and name not in {"quit", "help"}:
                yield SystemCommand(f"/{name}", command.sentence, getattr(self, f"action_{command.action}"))

    async def action_quit(self) -> None:
        if self._conversation is not None:
            self._conversation.stop()
        self.exit()


def has_screen() -> bool:
    """Whether standard input and output are a terminal that a full screen can be drawn on."""
    return os.isatty(0) and os.isatty(1) and os.environ.get("TERM", "") not in {"", "dumb"}
