"""`calpaca plugins new NAME`: a plugin to start from, whose tests pass as it is written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import click

from calpaca import __version__
from calpaca.core.errors import UsageError

KINDS = ("app", "engine", "loader", "store")
_SUFFIX = ".template"
_PACKAGE = "PACKAGE"


@click.command()
@click.argument("name")
@click.option("--app", "kind", flag_value="app", default="app", help="An app and a command (this is the default).")
@click.option("--engine", "kind", flag_value="engine", help="An engine that runs models.")
@click.option("--loader", "kind", flag_value="loader", help="A document loader for a kind of file.")
@click.option("--store", "kind", flag_value="store", help="A vector store.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Folder to make; else calpaca-NAME.")
def new(name: str, kind: str, output: Path | None) -> None:
    """Write a plugin whose tests pass, to start from.

    It is a distribution calpaca-NAME with an entry point, tests that subclass the test kit's contracts, a README and a CI
    file. Nothing is fetched.
    """
    _check(name)
    folder = output or Path(f"calpaca-{name.replace('_', '-')}")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"The folder {folder} is not empty.", "Name another one with --output.")
    write_plugin(name, kind, folder)
    click.echo(folder)
    click.echo(
        f"Try it: cd {folder} && pip install -e . --group test && pytest && calpaca plugins docs {name}", err=True
    )


def write_plugin(name: str, kind: str, folder: Path) -> None:
    """Write the files of a plugin of one of `KINDS` into `folder`."""
    words = _words(name)
    templates = files(__package__) / "templates"
    for source in (templates / "common", templates / kind):
        for path, template in _templates(source):
            target = folder / _filled(path, words)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_filled(template.read_text(encoding="utf-8"), words), encoding="utf-8")


def _check(name: str) -> None:
    """Raise UsageError for a name that no plugin can have, or that something else has."""
    from calpaca.cli.main import COMMANDS
    from calpaca.cli.run import shared_runtime

    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise UsageError(
            f"'{name}' is no name for a plugin.", "Lower-case letters and digits, words parted by _: my_app"
        )
    if name in COMMANDS:
        raise UsageError(f"'{name}' is a command of calpaca itself.", "Choose another name.")
    record = next((record for record in shared_runtime().plugins.records if record.name == name), None)
    if record is not None:
        raise UsageError(f"A plugin '{name}' is installed already, from {record.distribution}.", "Choose another name.")


def _words(name: str) -> Mapping[str, str]:
    major, minor, *_ = __version__.split(".")
    return {
        "name": name,
        "Name": "".join(word.capitalize() for word in name.split("_")),
        "dashed": name.replace("_", "-"),
        "package": f"calpaca_{name}",
        "versions": f">={major}.{minor},<{major}.{int(minor) + 1}",
    }


def _filled(text: str, words: Mapping[str, str]) -> str:
    """Fill `{{word}}`; a GitHub workflow's own `${{ … }}` has blanks."""
    for word, value in words.items():
        text = text.replace("{{" + word + "}}", value)
    return text.replace(_PACKAGE, words["package"])


def _templates(folder: Traversable, inside: str = "") -> Iterator[tuple[str, Traversable]]:
    """Path and content of every file that is to be written."""
    for each in folder.iterdir():
        path = f"{inside}{each.name}"
        if each.is_dir():
            yield from _templates(each, f"{path}/")
        elif path.endswith(_SUFFIX):
            yield path.removesuffix(_SUFFIX), each
