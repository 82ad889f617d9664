"""The catalogue's own consistency."""

from __future__ import annotations

import re

import pytest

from calpaca.core import catalogue
from calpaca.core.catalogue import ENTRIES, Entry, PinnedWheels
from calpaca.core.sources import HUB_ID


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_entries_are_complete(entry: Entry) -> None:
    assert ENTRIES[entry.name] is entry
    assert entry.name == entry.name.lower()
    assert entry.summary.endswith(".")
    assert entry.licence in {"Apache-2.0", "MIT"}
    assert entry.size > 1_000_000
    assert entry.context_length >= 512


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_origins_are_pinned_or_hub_ids(entry: Entry) -> None:
    for origin in entry.origins:
        if not isinstance(origin, PinnedWheels):
            assert HUB_ID.fullmatch(origin.id)
            continue
        for file in origin.files:
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert re.fullmatch(r"[0-9a-f]{64}", file.wheel_sha256)
            assert file.wheel.startswith(f"{file.package.replace('-', '_')}-{file.version}-")


def test_the_embedded_models_need_no_hub() -> None:
    for entry in (catalogue.EMBEDDED_CHAT, catalogue.DEFAULT_EMBEDDING):
        assert isinstance(entry.origins[0], PinnedWheels)
    assert catalogue.DEFAULT_CHAT.kind == catalogue.EMBEDDED_CHAT.kind == "chat"
    assert catalogue.DEFAULT_EMBEDDING.kind == "embedding"
