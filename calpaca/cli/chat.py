"""`calpaca chat`: a conversation with a model, kept as a session."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

import click
from pydantic import Field

from calpaca.cli.answer import AnswerPrinter
from calpaca.cli.failure import report
from calpaca.cli.flags import flags, group_of
from calpaca.cli.run import AppCommand, answers_only, shared_runtime, was_typed
from calpaca.core.errors import CalpacaError, MissingExtraError, UsageError
from calpaca.plugins.chat_setup import ChatSetup
from calpaca.plugins.chat_setup import preset as preset_values
from calpaca.plugins.options import ModelOptions, flag_name, read_options

if TYPE_CHECKING:
    from calpaca.core.conversation import Conversation
    from calpaca.core.runtime import Runtime
    from calpaca.core.sessions import Session
    from calpaca.core.settings import Settings

_HISTORY_LINES = 1000


class ChatOptions(ChatSetup):
    """What `calpaca chat` is told."""

    plain: bool = Field(False, description="Line by line, without a screen of its own; works in a pipe.")
    session: str | None = Field(None, description="A session to go on with, by title or id; a new title begins one.")
    single_turn: bool = Field(False, description="Answer each line by itself, without those before it.")
    web: bool = Field(False, description="Serve the chat to a browser on this machine; prints its address.")
    port: int = Field(0, ge=0, le=65535, description="With --web: port to listen on; 0 takes a free one.")
    preset: str | None = Field(None, description="A set-up by its name in the settings ([presets.NAME]).")

    def setup(self, settings: Settings) -> ChatSetup:
        """How the chat is to be held: what was typed goes over the preset."""
        begun = ChatSetup()
        if self.preset is not None:
            begun = begun.changed(preset_values(self.preset, settings))
        return begun.changed(self.model_dump(mode="json", include=self.model_fields_set & set(ChatSetup.model_fields)))


@click.pass_context
def _chat(ctx: click.Context, /, **values: Any) -> int:
    typed = {name: value for name, value in values.items() if was_typed(ctx, name)}
    as_json = typed.pop("_json", False)
    try:
        options = read_options(ChatOptions, typed, "chat")
    except UsageError as error:
        raise UsageError(error.message, "See: calpaca chat --help") from error
    assert isinstance(options, ChatOptions)
    runtime = shared_runtime()
    if options.web:
        _in_browser(options, runtime)
        return 0
    if not (options.plain or options.single_turn or as_json):
        _on_screen(options, runtime)
        return 0
    with answers_only() as out, _line_history():
        return _talk(_conversation(options, runtime), out, as_json=as_json, alone=options.single_turn)


def _on_screen(options: ChatOptions, runtime: Runtime) -> None:
    """The full-screen chat. Raises UsageError where there is no screen, and for names that nobody knows."""
    from calpaca.plugins.hosting import ModelHost
    from calpaca.tui.app import ChatApp, has_screen

    if not has_screen():
        raise UsageError("The chat needs a terminal of its own.", "Add --plain to talk line by line.")
    setup = options.setup(runtime.settings)
    runtime.check(setup.spec())
    setup.sampling(runtime.settings)
    session = _session(options, setup, runtime)
    setup = setup.changed({"system": session.record.setup.get("system")})
    app = ChatApp(runtime, ModelHost(attaches=runtime.settings.attach), session, setup)
    try:
        app.run()
    finally:
        app.close_model()


def _in_browser(options: ChatOptions, runtime: Runtime) -> None:
    """The chat in a browser. Raises MissingExtraError without textual-serve, UsageError without `calpaca serve`."""
    from importlib.util import find_spec

    if find_spec("textual_serve") is None:
        raise MissingExtraError("The chat in a browser", "web", "textual-serve")
    from calpaca.plugins.catalogue import plugin_with_command
    from calpaca.plugins.commands import plugin_commands
    from calpaca.tui.web import serve_chat

    setup = options.setup(runtime.settings)
    is_local = runtime.is_local(runtime.check(setup.spec()))
    if is_local and "serve" not in plugin_commands(()):
        known = plugin_with_command("serve")
        raise UsageError(
            "--web needs the command `calpaca serve`, which is not installed.",
            f"Install it with: pip install {known.distribution}" if known else "See: calpaca plugins",
        )
    shared = set(ModelOptions.model_fields)
    serve_chat(
        _arguments(options, options.model_fields_set - {"web", "port"}),
        _arguments(setup, setup.model_fields_set & shared) if is_local else [],
        options.port,
    )


def _arguments(options: ChatSetup, names: Iterable[str]) -> list[str]:
    """Options as they are typed."""
    typed: list[str] = []
    for name in sorted(names):
        flag, value = flag_name(type(options), name), getattr(options, name)
        if isinstance(value, bool):
            typed.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            for each in value if isinstance(value, list) else [value]:
                typed += [] if each is None else [f"--{flag}", str(each)]
    return typed


def _conversation(options: ChatOptions, runtime: Runtime) -> Conversation:
    from calpaca.core.conversation import Conversation

    setup = options.setup(runtime.settings)
    sampling = setup.sampling(runtime.settings)
    runtime.attaches = runtime.settings.attach
    session = _session(options, setup, runtime)
    model = runtime.model(setup.spec())
    return Conversation(session, model, sampling, setup.context)


def _session(options: ChatOptions, setup: ChatSetup, runtime: Runtime) -> Session:
    """The session that is named, or a new one.

    Raises UsageError for a system text that would come too late, SessionError for a name of several sessions.
    """
    if options.session is not None and runtime.sessions.named(options.session):
        if options.system is not None:
            raise UsageError(
                f"The session '{options.session}' has begun already.", "Leave --system out, or name a new session."
            )
        return runtime.sessions.find(options.session)
    return runtime.sessions.new(setup.given(), options.session or "")


def _talk(conversation: Conversation, out: TextIO, *, as_json: bool, alone: bool) -> int:
    """Answer the lines of stdin until a blank one; the exit code of the last answer that failed, or 0."""
    code = 0
    for line in _lines():
        if alone:
            conversation.begin_anew()
        printer = AnswerPrinter(out, sys.stderr, answer="answer", as_json=as_json, indent=None)
        try:
            with closing(conversation.ask(line)) as events:
                printer.show(events)
        except CalpacaError as error:
            code = report(error)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo("\n[stopped; what there was of it is kept]", err=True)
    return code


def _lines() -> Iterator[str]:
    """What is typed, until a blank line or the end; on a terminal with a prompt and the keys of readline."""
    asks = sys.stdin is not None and sys.stdin.isatty()
    while sys.stdin is not None:
        try:
            line = input("> ") if asks else sys.stdin.readline()
        except EOFError:
            click.echo(err=True)
            return
        if not line.strip():
            return
        yield line.strip()


@contextmanager
def _line_history() -> Iterator[None]:
    """Lines typed at the prompt can be called up again, also those of earlier chats."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    import readline

    from calpaca.core.paths import data_dir

    file = data_dir() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(_HISTORY_LINES)
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


_JSON = click.Option(["_json", "--json"], is_flag=True, help="Print one JSON object for each answer.")

chat = AppCommand(
    "chat",
    params=[*(flag for flag in flags("chat", ChatOptions) if flag.name != "embedding"), _JSON],
    callback=_chat,
    help="""Talk with a model. A blank line ends.

    Each conversation is kept as a session while it is held; --session goes on with one.
    """,
    groups={name: group_of(ChatOptions, name) for name in ChatOptions.model_fields},
)
