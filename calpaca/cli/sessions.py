"""`calpaca sessions`: the conversations that are kept, those of the chat and those about documents."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.group import Group
from calpaca.cli.table import table

if TYPE_CHECKING:
    from calpaca.core.sessions import SessionRecord, Sessions

_EXCERPT = 100


@click.group(cls=Group)
def sessions() -> None:
    """List, search, show and remove conversations.

    `calpaca chat --session NAME` goes on with one, and an app with the option --session with one of its own.
    """


@sessions.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list_sessions(as_json: bool) -> None:
    """List the conversations, the one used last first."""
    found = [record for record in _store().records() if record.messages]
    if as_json:
        _print_json([_as_json(record) for record in found])
    elif found:
        rows = [
            (record.id, _kind(record), str(record.messages), _time(record.updated), record.title) for record in found
        ]
        click.echo(table(("ID", "WITH", "MESSAGES", "CHANGED", "TITLE"), rows))
    else:
        click.echo("No sessions yet.", err=True)


@sessions.command()
@click.argument("words", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print the messages whole, as JSON.")
def search(words: tuple[str, ...], as_json: bool) -> None:
    """Find messages that hold all of these words, the newest first."""
    found = _store().search(" ".join(words))
    if as_json:
        _print_json([{"session": _as_json(each.session), **asdict(each.message)} for each in found])
    elif found:
        rows = [(each.session.id, each.session.title, _excerpt(each.message.content, words[0])) for each in found]
        click.echo(table(("ID", "TITLE", "MESSAGE"), rows))
    else:
        click.echo("Nothing found.", err=True)


@sessions.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print all branches, with what each answer rests on, as JSON.")
def show(name: str, as_json: bool) -> None:
    """Print a conversation as Markdown, with its sources. NAME is a title, an id or the beginning of an id."""
    from calpaca.core.session_export import exported

    click.echo(exported(_store().find(name), ".json" if as_json else ".md"), nl=False)


@sessions.command()
@click.argument("name")
def remove(name: str) -> None:
    """Remove a conversation and all its branches."""
    store = _store()
    record = store.find(name).record
    store.delete(record.id)
    click.echo(f"Removed {record.id} ({record.title}).", err=True)


def _store() -> Sessions:
    from calpaca.cli.run import shared_runtime

    return shared_runtime().sessions


def _kind(record: SessionRecord) -> str:
    return str(record.setup.get("app", "chat"))


def _as_json(record: SessionRecord) -> dict[str, Any]:
    return {"id": record.id, "title": record.title, "with": _kind(record), "messages": record.messages,
            "created": record.created, "updated": record.updated}  # fmt: skip


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def _excerpt(content: str, word: str) -> str:
    """A line of a message around a word of it."""
    line = " ".join(content.split())
    start = max(line.casefold().find(word.casefold()) - _EXCERPT // 3, 0)
    return ("…" if start else "") + line[start : start + _EXCERPT]


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")  # local time, as a person reads it
