"""What the server tells other processes of its user, who may then use its models."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from calpaca.core.attaching import announced, offer
from calpaca.core.errors import CalpacaError
from calpaca_openai_api.served import ServedModels
from calpaca_openai_api.settings import KeySettings, digest

_NAME = "attached"


def attached_key(secret: str | None) -> dict[str, KeySettings]:
    """The key that stands in the announcement, where keys are asked for at all."""
    return {} if secret is None else {_NAME: KeySettings(sha256=digest(secret))}


@contextmanager
def announcement(url: str, secret: str | None, models: ServedModels) -> Iterator[None]:
    """Announce the models that are loaded now. Their files are hashed first, beside what is served."""
    ended = threading.Event()
    thread = threading.Thread(target=_announce, args=[url, secret, models, ended], daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5.0)  # it may be hashing still; then there is nothing to take back


def _announce(url: str, secret: str | None, models: ServedModels, ended: threading.Event) -> None:
    try:
        offers = [offer(served.id, model.fingerprint, model.spec) for served, model in models.local()]
    except (CalpacaError, OSError):
        return  # files went while they were hashed; nobody attaches then
    with ExitStack() as stack:
        if not ended.is_set():
            stack.enter_context(announced(url, secret, offers))
        ended.wait()
