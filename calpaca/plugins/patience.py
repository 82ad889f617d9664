"""How long a plugin may take to load: a word after a while, and an end to one that hangs."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from calpaca.core.errors import PluginError

logger = logging.getLogger("calpaca")

WORD_AFTER = 5.0
END_AFTER = 30.0


@contextmanager
def patience(plugin: str) -> Iterator[None]:
    """Say on stderr that `plugin` takes long; after 30 seconds raise PluginError where it stands.

    The end needs Unix's timer signal: elsewhere, in another thread than the main one, or where somebody uses that timer
    already, there is only the word.
    """
    word = threading.Timer(
        WORD_AFTER, logger.warning, ["Plugin %s is still loading. CALPACA_PLUGINS can leave it out.", plugin]
    )
    word.daemon = True
    word.start()
    try:
        if _timer_is_free():
            with _end_after(END_AFTER):
                yield
        else:
            yield
    finally:
        word.cancel()


def _timer_is_free() -> bool:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return False
    return signal.getitimer(signal.ITIMER_REAL)[0] == 0


@contextmanager
def _end_after(seconds: float) -> Iterator[None]:
    def end(_number: int, _frame: FrameType | None) -> None:
        raise PluginError(
            f"It was not loaded within {seconds:g} seconds.", "See what it waits for with: calpaca plugins --check"
        )

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
