"""`calpaca plugins freeze` and `sync`: the plugins of one environment, and the same ones in another."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from packaging.requirements import InvalidRequirement, Requirement

from calpaca.core.errors import PluginError, UsageError
from calpaca.plugins.discovery import BUILTIN, installed_plugins

_STDERR = 2


@click.command()
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write instead of stdout.")
def freeze(output: Path | None) -> None:
    """Print the installed plugins as pip requirements, with versions or the places they were installed from.

    After an upgrade or in a new environment, `calpaca plugins sync FILE` installs them again.
    """
    text = "".join(f"{line}\n" for line in frozen_plugins())
    if not text:
        click.echo("No plugin is installed.", err=True)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--dry-run", is_flag=True, help="Print what would be installed.")
def sync(file: Path, dry_run: bool) -> None:
    """Install the plugins of a frozen list that are missing or of another version, with uv or pip.

    Plugins that the list does not name stay.
    """
    missing = [line for line in _requirements(file) if not _is_installed(line)]
    if not missing:
        click.echo("All plugins of the list are installed.", err=True)
    elif dry_run:
        click.echo("\n".join(missing))
    else:
        _install(missing)
        click.echo(f"Installed: {', '.join(missing)}", err=True)


def frozen_plugins() -> Iterator[str]:
    """A requirement for every distribution that brings a plugin, sorted."""
    names = {candidate.distribution for candidate in installed_plugins() if candidate.name != BUILTIN}
    for name in sorted(names, key=str.casefold):
        yield _requirement(metadata.distribution(name))


def _requirement(distribution: metadata.Distribution) -> str:
    """`name==version`, or where it was installed from (PEP 610, `direct_url.json`)."""
    name, version = distribution.metadata["Name"], distribution.version
    origin = _origin(distribution)
    url = str(origin.get("url", ""))
    if origin.get("dir_info", {}).get("editable"):
        return f"-e {url}"
    if "vcs_info" in origin:
        return f"{name} @ {origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    return f"{name} @ {url}" if url else f"{name}=={version}"


def _origin(distribution: metadata.Distribution) -> dict[str, Any]:
    origin: dict[str, Any] = json.loads(distribution.read_text("direct_url.json") or "{}")
    return origin


def _requirements(file: Path) -> list[str]:
    """Lines of a list. Raises UsageError that names a line which is no requirement."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    for number, line in enumerate(lines, start=1):
        try:
            if line in wanted and not line.startswith("-e "):
                Requirement(line)
        except InvalidRequirement as error:
            raise UsageError(
                f"{file}:{number} is no requirement: {line}", "A list comes from: calpaca plugins freeze"
            ) from error
    return wanted


def _is_installed(line: str) -> bool:
    """Whether this environment would freeze to this line, or has a version that fits it."""
    if line in set(frozen_plugins()):
        return True
    if line.startswith("-e "):
        return False
    requirement = Requirement(line)
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.url is None and requirement.specifier.contains(version, prereleases=True)


def _install(requirements: list[str]) -> None:
    """Raises PluginError when the installer fails; it prints its own messages."""
    with TemporaryDirectory() as folder:
        listed = Path(folder, "plugins.txt")
        listed.write_text("\n".join(requirements), encoding="utf-8")
        command = [*_installer(), "install", "-r", str(listed)]
        code = subprocess.run(command, stdout=_STDERR, check=False).returncode  # noqa: S603  # stdout is for answers
    if code:
        raise PluginError(f"Not everything could be installed: {', '.join(requirements)}.", "The installer says why.")


def _installer() -> list[str]:
    """pip of this environment, or uv for an environment without one. Raises PluginError without either."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv")
    if uv is None:
        raise PluginError("There is neither pip here nor uv.", "Install the list with your package manager.")
    return [uv, "pip", f"--python={sys.executable}"]
