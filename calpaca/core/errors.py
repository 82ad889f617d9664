"""The exception tree. Every error says what happened and what to type next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, ClassVar


class CalpacaError(Exception):
    """An error that a person can act on.

    `message` says what happened, with the value; `hint` says what to do next. The command line prints
    both on stderr and exits with `exit_code`.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross from one process to another, also those whose constructors take other arguments."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[CalpacaError], arguments: tuple[Any, ...], state: dict[str, Any]) -> CalpacaError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


class UsageError(CalpacaError):
    """A wrong option, argument, setting or name."""

    exit_code = 2


class MissingExtraError(UsageError):
    """A feature needs packages that are not installed."""

    def __init__(self, feature: str, extra: str, missing: str) -> None:
        super().__init__(
            f"{feature} needs the package '{missing}', which is not installed.",
            f"Install it with: pip install 'calpaca[{extra}]'",
        )


class ModelError(CalpacaError):
    """A model could not be found, fetched, loaded or run."""

    exit_code = 3


class ModelNotFoundError(ModelError):
    """No source knows the model."""


class DownloadError(ModelError):
    """A file could not be fetched, or what came is not what was asked for."""


class CorruptFileError(ModelError):
    """A weights file is damaged or truncated."""


class AdapterError(ModelError):
    """An adapter does not belong to the model it is to be put on."""


class ContextOverflowError(ModelError):
    """Prompt and answer do not fit the model's context."""

    def __init__(self, prompt_tokens: int, max_new_tokens: int, context_length: int) -> None:
        over = prompt_tokens + max_new_tokens - context_length
        room = context_length - prompt_tokens
        hint = f"Shorten the prompt by {over} tokens"
        if room > 0:
            hint += f", or ask for at most {room} new tokens (--max-new-tokens {room})"
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and {max_new_tokens} new ones are asked for, "
            f"but the context holds {context_length}.",
            hint + ".",
        )
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.context_length = context_length


class AnswerTimeoutError(ModelError, TimeoutError):
    """An answer took longer than it was allowed to."""


class UnsupportedError(ModelError):
    """An engine was asked for something that it cannot do."""


class DocumentError(CalpacaError):
    """A document, folder or index could not be read."""


class PluginError(CalpacaError):
    """A plugin is broken, incompatible, or clashes with another."""

    exit_code = 4


class JobError(CalpacaError):
    """A job is unknown, failed or cannot be resumed."""


class SessionError(CalpacaError):
    """A session is unknown, or the file of sessions cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, or None."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> tuple[str, str]:
    """Message and hint for a name that is not known: the nearest match and the whole list."""
    names = sorted(known)
    match = nearest(name, names)
    suggestion = f"Did you mean '{match}'? " if match else ""
    return f"Unknown {kind} '{name}'.", f"{suggestion}Known: {', '.join(names) or 'none'}."
