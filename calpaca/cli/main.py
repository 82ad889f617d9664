"""The program: a group of commands that are imported when they are used, and the one place where errors end.

Exit codes: 0 done, 1 failed, 2 wrong use or settings, 3 model, 4 plugin, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

import click

from calpaca import __version__
from calpaca.cli.failure import INTERRUPTED, report
from calpaca.cli.group import LazyGroup
from calpaca.core.errors import UsageError
from calpaca.plugins.commands import PluginCommand, plugin_commands

COMMANDS = {
    "run": ("calpaca.cli.run:run", "Run an app, or list the installed ones."),
    "chat": ("calpaca.cli.chat:chat", "Talk with a model."),
    "generate": ("calpaca.cli.generate:generate", "Answer one instruction, or a file of them."),
    "models": (
        "calpaca.cli.models:models",
        "List, fetch, describe, convert, merge, verify, compare and export models.",
    ),
    "plugins": ("calpaca.cli.plugins:plugins", "List the installed plugins and what is wrong with them."),
    "jobs": ("calpaca.cli.jobs:jobs", "List, explain and resume long runs."),
    "sessions": ("calpaca.cli.sessions:sessions", "List, search, show and remove conversations."),
    "indexes": ("calpaca.cli.indexes:indexes", "List and remove indexes of documents."),
    "bench": ("calpaca.cli.bench:bench", "Measure what runs fastest on this machine."),
    "doctor": (
        "calpaca.cli.doctor:doctor",
        "Show what calpaca finds here, what is broken and what would help.",
    ),
    "settings": ("calpaca.cli.settings:settings", "Show the settings in force and where files lie."),
}
"""Name: (import path, sentence). The sentences stand here so that `--help` imports no command."""


class Program(LazyGroup):
    """The commands of `COMMANDS` and of the plugins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *(name for name in plugin_commands(COMMANDS) if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            return super().get_command(ctx, cmd_name)
        offered = plugin_commands(COMMANDS).get(cmd_name)
        if offered is None:
            return None
        command: click.Command = offered.load()
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and self.get_command(ctx, args[0]) is None:
            _say_what_to_install(args[0])
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_commands(ctx, formatter)
        offered = plugin_commands(COMMANDS)
        if offered:
            with formatter.section("Commands of plugins"):
                formatter.write_dl([(name, _sentence(command)) for name, command in offered.items()])


def _sentence(command: PluginCommand) -> str:
    """What stands beside a plugin's command; a clash names both sides."""
    return f"Clash: {command.distribution} and {command.clash} both offer it." if command.clash else command.summary


def _say_what_to_install(name: str) -> None:
    """Raise UsageError for a command that a first-party plugin brings which is not installed."""
    from calpaca.plugins.catalogue import plugin_with_command

    plugin = plugin_with_command(name)
    if plugin is not None:
        raise UsageError(
            f"The command '{name}' is not there: the plugin '{plugin.name}' is not installed, or CALPACA_PLUGINS leaves"
            " it out.",
            f"Install it with: pip install {plugin.distribution}",
        )


@click.group(
    cls=Program,
    commands_by_path=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    name="calpaca",
)
@click.version_option(__version__, prog_name="calpaca", message="%(prog)s %(version)s")
@click.option(
    "--strict-plugins", is_flag=True, help="End with 4 when a plugin is broken instead of going on without it."
)
def program(strict_plugins: bool) -> None:
    """Turn local LLaMA-family weights into applications.

    Answers go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong use or settings, 3 model,
    4 plugin, 130 interrupted.
    """
    if strict_plugins:
        os.environ["CALPACA_STRICT_PLUGINS"] = "1"


def start() -> None:
    """What the command `calpaca` calls.

    After Ctrl-C the process ends at once: tearing down an interpreter with torch in it takes longer than the second
    that a person waits, and what had to be put away was put away while the exception went up.
    """
    code = main()
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    _speak_utf8()
    _quiet_libraries()
    try:
        given = None if arguments is None else list(arguments)
        code = program.main(given, prog_name="calpaca", standalone_mode=False, obj=tuple(given or sys.argv[1:]))
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        return report(error)


def _speak_utf8() -> None:
    """Read and write UTF-8 whatever the locale says; what cannot be encoded is escaped instead of an error."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace" if stream is sys.stdin else "backslashreplace")


def _quiet_libraries() -> None:
    """Show calpaca's own notices, one line each, and keep other libraries' chatter off the screen."""
    logger = logging.getLogger("calpaca")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
    logger.setLevel(logging.INFO)
    if "CALPACA_DEBUG" in os.environ:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at every fork


class _StderrHandler(logging.Handler):
    """Writes to whatever stderr is at the time, above a progress bar that may be standing there."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(" ".join(record.getMessage().split()), err=True)
