"""The one place that prints errors: what happened on one line, what to do on the next."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from pathlib import Path

import click

from calpaca.core.decoding import instead_of
from calpaca.core.errors import CalpacaError, nearest

FAILED = 1
INTERRUPTED = 130
_SYSTEM_FAULTS = {
    errno.ENOSPC: "Free disk space; CALPACA_CACHE and CALPACA_DATA move what calpaca writes.",
    errno.EDQUOT: "Free disk space; CALPACA_CACHE and CALPACA_DATA move what calpaca writes.",
    errno.EACCES: "Check the permissions; CALPACA_CACHE and CALPACA_DATA move what calpaca writes.",
    errno.EPERM: "Check the permissions; CALPACA_CACHE and CALPACA_DATA move what calpaca writes.",
    errno.EROFS: "Set CALPACA_CACHE and CALPACA_DATA to folders that can be written.",
}
"""Faults of the machine, not of calpaca, and what helps."""


def report(error: BaseException) -> int:
    """Print an error on stderr; the exit code that belongs to it."""
    if os.environ.get("CALPACA_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return FAILED
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return error.exit_code
    message, hint, code = _explain(error)
    click.echo(f"calpaca: {_one_line(message)}", err=True)
    if hint:
        click.echo(f"  {_one_line(hint)}", err=True)
    return code


def _explain(error: BaseException) -> tuple[str, str, int]:
    """What happened, what to do, and the exit code."""
    match error:
        case KeyboardInterrupt() | click.Abort():
            return "Interrupted.", "", INTERRUPTED
        case CalpacaError():
            return error.message, error.hint, error.exit_code
        case click.ClickException():
            return *_usage(error), error.exit_code
        case OSError() if error.errno in _SYSTEM_FAULTS:
            place = f": {error.filename}" if error.filename else ""
            return f"{error.strerror}{place}.", _SYSTEM_FAULTS[error.errno], FAILED
    return f"This is a bug in calpaca or a plugin: {type(error).__name__}: {error}", _keep_traceback(error), FAILED


def _silence_stdout() -> None:
    """Whoever read stdout is gone; Python's own flush at exit must not complain about it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _usage(error: click.ClickException) -> tuple[str, str]:
    """click's own message, and the nearest option or the help to look at."""
    context = getattr(error, "ctx", None)
    help_line = f"See: {context.command_path} --help" if context is not None else "See: calpaca --help"
    if isinstance(error, click.NoSuchOption):
        refusal = instead_of(error.option_name)
        if refusal is not None:
            return refusal
        near = nearest(error.option_name, error.possibilities or ())
        return f"Unknown option '{error.option_name}'.", f"Did you mean '{near}'? {help_line}" if near else help_line
    return error.format_message(), help_line


def _keep_traceback(error: BaseException) -> str:
    """Write the traceback to a file; a sentence that says where it lies."""
    from calpaca.core.paths import cache_dir  # platformdirs is not needed until something goes wrong

    path = Path(cache_dir(), "logs", f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    except OSError as unwritable:
        return f"Its traceback could not be written ({unwritable}); CALPACA_DEBUG=1 shows it."
    return f"Please report it with the file {path}; CALPACA_DEBUG=1 shows the traceback."
