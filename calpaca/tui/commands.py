"""What can be typed after a slash: a name, what it takes and what it does."""

from __future__ import annotations

from dataclasses import dataclass

from calpaca.core.errors import UsageError, unknown_name


@dataclass(frozen=True)
class Command:
    """`action` is the app's action of that name, which gets the rest of the line where `takes` names it."""

    action: str
    sentence: str
    takes: str = ""


COMMANDS = {
    "new": Command("new", "Begin a new session."),
    "sessions": Command("sessions", "Look through the sessions, and go on with one."),
    "system": Command("system", "Set the system text of a session that has not begun.", "TEXT"),
    "rename": Command("rename", "Give the session a title.", "TITLE"),
    "fork": Command("fork", "Go on in a copy of this conversation."),
    "export": Command("export", "Write the session: .md to read, .json with all branches, .jsonl to train on.", "FILE"),
    "import": Command("import", "Read sessions that were exported, or ShareGPT rows.", "FILE"),
    "again": Command("again", "Have the last question answered once more, beside the answer that is there."),
    "edit": Command("edit", "Change the last question: what follows becomes a branch of its own."),
    "copy": Command("copy", "Copy the last answer."),
    "stop": Command("stop", "End the answer in hand where it is."),
    "help": Command("help", "List these commands and the keys."),
    "quit": Command("quit", "Leave. Everything is kept."),
}


def parse(text: str) -> tuple[Command, str] | None:
    """The command of a line and the rest of it; None for a line that is no command. Two slashes make one of a text.

    Raises UsageError for an unknown command, or one without what it takes.
    """
    if not text.startswith("/") or text.startswith("//"):
        return None
    name, _, rest = text[1:].partition(" ")
    if name not in COMMANDS:
        raise UsageError(*unknown_name("command", name, COMMANDS))
    command, rest = COMMANDS[name], rest.strip()
    if command.takes and not rest:
        raise UsageError(f"/{name} needs something after it.", f"Write: /{name} {command.takes}")
    return command, rest


def help_text() -> str:
    """All commands as a Markdown table."""
    rows = [f"| `/{name} {command.takes}".rstrip() + f"` | {command.sentence} |" for name, command in COMMANDS.items()]
    return "\n".join(["| Command | |", "| --- | --- |", *rows])
