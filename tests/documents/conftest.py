from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calpaca.core.events import Event, Notice, Progress
from calpaca.documents.index import DocumentIndex
from calpaca.testing import FakeRuntime, fake_runtime


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRuntime]:
    """A runtime with a fake embedder, and a cache of its own."""
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    with fake_runtime() as runtime:
        yield runtime


@pytest.fixture
def make_index(runtime: FakeRuntime) -> Callable[..., DocumentIndex]:
    """`make_index(path, …)` opens an index on the runtime's fake embedder, in small chunks."""

    def make(*paths: Path, store: str = "faiss", **options: Any) -> DocumentIndex:
        sizes = {"chunk_size": 13, "chunk_overlap": 0} | options
        return DocumentIndex(paths, runtime.fake_embedder, runtime.loaders, runtime.stores.get(store), **sizes)

    return make


@pytest.fixture
def sync(runtime: FakeRuntime) -> Callable[[DocumentIndex], list[Event]]:
    """`sync(index)` brings an index up to date and returns what it reported."""

    def run(index: DocumentIndex) -> list[Event]:
        return list(index.sync(lambda: runtime.jobs.start("test", "Index", {"folder": str(index.folder)})))

    return run


@pytest.fixture
def notices() -> Callable[[list[Event]], list[str]]:
    """`notices(events)` are the lines for a person among them."""
    return lambda events: [event.text for event in events if isinstance(event, Notice)]


@pytest.fixture
def progress() -> Callable[[list[Event]], list[tuple[int, int | None]]]:
    """`progress(events)` are the steps that were reported."""
    return lambda events: [(event.done, event.total) for event in events if isinstance(event, Progress)]
