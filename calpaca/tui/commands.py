"""What can be typed after a slash: a name, what it takes and what it does. Installed apps are commands beside these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calpaca.core.errors import UsageError, unknown_name
from calpaca.tui import app_commands, attaching, comparison, message_commands, session_commands, setup_commands

if TYPE_CHECKING:
    from calpaca.plugins.instances import Instance
    from calpaca.tui.app import ChatApp


@dataclass(frozen=True)
class Command:
    """`run` is called with the chat and the rest of the line, which must not be empty where `takes` names it bare;
    what may be left out stands in brackets. What `run` returns is awaited where it can be.
    """

    run: Callable[[ChatApp, str], Any]
    sentence: str
    takes: str = ""

    @property
    def needs_text(self) -> bool:
        return bool(self.takes) and not self.takes.startswith("[")


COMMANDS = {
    "new": Command(session_commands.new, "Begin a new session."),
    "sessions": Command(session_commands.choose, "Look through the sessions, and go on with one."),
    "rename": Command(session_commands.rename, "Give the session a title.", "[TITLE]"),
    "fork": Command(session_commands.fork, "Go on in a copy of this conversation."),
    "export": Command(
        session_commands.write, "Write the session: .md to read, .json with all branches, .jsonl to train on.", "FILE"
    ),
    "import": Command(session_commands.read, "Read sessions that were exported, or ShareGPT rows.", "FILE"),
    "model": Command(setup_commands.model, "Go on with another model; alone, say how this one is run.", "[NAME]"),
    "adapter": Command(
        setup_commands.adapter,
        "Put a LoRA adapter on the model; -PATH takes it off, none takes all off.",
        "PATH[@SCALE]",
    ),
    "engine": Command(setup_commands.option("engine"), "Run the model on another engine.", "NAME"),
    "template": Command(setup_commands.option("chat_template"), "Use another chat template.", "NAME"),
    "system": Command(setup_commands.system, "Change the system text of the conversation.", "TEXT"),
    "set": Command(
        setup_commands.assign, "Set an option, as in /set temperature 0.2; alone, list them.", "[OPTION VALUE]"
    ),
    "preset": Command(
        setup_commands.preset, "Take a preset of the settings, or save this set-up.", "[NAME | save NAME]"
    ),
    "attach": Command(
        attaching.attach, "Put a file or folder before the next question; none takes all away.", "FILE_OR_FOLDER"
    ),
    "compare": Command(comparison.compare, "Ask two or three set-ups side by side.", "[SET-UP | SET-UP …]"),
    "again": Command(
        message_commands.again, "Have the last question answered once more, beside the answer that is there."
    ),
    "edit": Command(message_commands.edit, "Change the last question: what follows becomes a branch of its own."),
    "copy": Command(message_commands.copy, "Copy the last answer; code copies its last block of code.", "[code]"),
    "sources": Command(message_commands.sources, "Show what the last answer about documents rests on."),
    "stop": Command(message_commands.stop, "End the answer in hand where it is."),
    "help": Command(message_commands.show_help, "List these commands and the keys."),
    "quit": Command(message_commands.leave, "Leave. Everything is kept."),
}


def app_command(name: str, instance: Instance) -> Command:
    """The command that runs an app."""
    return Command(app_commands.runner(name), instance.app.summary, f"[{(instance.app.input or 'text').upper()}]")


def parse(text: str, apps: Mapping[str, Command]) -> tuple[Command, str] | None:
    """The command of a line and the rest of it; None for a line that is no command. Two slashes make one of a text.

    Raises UsageError for an unknown command, or one without what it takes.
    """
    if not text.startswith("/") or text.startswith("//"):
        return None
    known = {**apps, **COMMANDS}
    words = text[1:].split(None, 1)
    name, rest = (words[0] if words else ""), (words[1].strip() if len(words) > 1 else "")
    if name not in known:
        raise UsageError(*unknown_name("command", name, known))
    if known[name].needs_text and not rest:
        raise UsageError(f"/{name} needs something after it.", f"Write: /{name} {known[name].takes}")
    return known[name], rest


def matching(text: str, apps: Mapping[str, Command]) -> dict[str, Command]:
    """The commands that a line may become; empty once a name is written and something follows."""
    if not text.startswith("/") or text.startswith("//") or any(character.isspace() for character in text):
        return {}
    return {name: command for name, command in {**COMMANDS, **apps}.items() if name.startswith(text[1:])}


def help_text(apps: Mapping[str, Command]) -> str:
    """All commands as a Markdown table."""
    rows = [
        f"| `/{name} {command.takes.replace('|', 'or')}".rstrip() + f"` | {command.sentence} |"
        for name, command in {**COMMANDS, **apps}.items()
    ]
    return "\n".join(["| Command | |", "| --- | --- |", *rows])
