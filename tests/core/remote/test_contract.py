"""The contract of every engine, kept by the remote one over real servers with real weights behind them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from calpaca.core.engine import Engine
from calpaca.core.engines.remote.address import read_address
from calpaca.core.engines.remote.engine import RemoteEngine
from calpaca.testing import EngineContract


def remote(serving, engine: Engine, kind: str) -> Iterator[RemoteEngine]:
    opened = RemoteEngine([read_address(serving(engine, kind).url)])
    yield opened
    opened.close()


class TestServerThatTokenizes(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, serving, smollm2_engine: Engine) -> Iterator[RemoteEngine]:
        yield from remote(serving, smollm2_engine, "calpaca")


@pytest.mark.slow
class TestPlainServer(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, serving, smollm2_engine: Engine) -> Iterator[RemoteEngine]:
        yield from remote(serving, smollm2_engine, "openai")
