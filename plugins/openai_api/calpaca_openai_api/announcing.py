"""What the server tells other processes of its user, who may then use its models."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from calpaca.core.attaching import Offer, announced, offer
from calpaca.core.errors import CalpacaError
from calpaca_openai_api.served import ServedModels
from calpaca_openai_api.settings import KeySettings, digest

_NAME = "attached"
_SECONDS = 1.0
"""How often the models that are loaded are looked at."""


def attached_key(secret: str | None) -> dict[str, KeySettings]:
    """The key that stands in the announcement, where keys are asked for at all."""
    return {} if secret is None else {_NAME: KeySettings(sha256=digest(secret))}


@contextmanager
def announcement(url: str, secret: str | None, models: ServedModels) -> Iterator[None]:
    """Announce the models that are loaded, adapters among them, also those that come and go meanwhile. Their files are
    hashed first, beside what is served."""
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
        told = _offers(models)
        if ended.is_set():
            return
        with announced(url, secret, told) as announcement:
            while not ended.wait(_SECONDS):
                offers = _offers(models)
                if offers != told:
                    announcement.tell(offers)
                    told = offers
    except (CalpacaError, OSError):
        return  # files went while they were hashed; nobody attaches then


def _offers(models: ServedModels) -> list[Offer]:
    return [offer(served.id, model.fingerprint, model.spec) for served, model in models.local()]
