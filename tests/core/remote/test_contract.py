"""The contract of every engine, kept by the remote one over real servers with real weights behind them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

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


LLAMA_CPP = """
import sys, threading, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.port, parameters.n_parallel, parameters.n_ctx = int(sys.argv[2]), 8, 8 * 2048
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
threading.Event().wait()
"""


@pytest.mark.slow
class TestLlamaCppServer(EngineContract):
    """The server of llama.cpp itself, in a process of its own."""

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, smollm2_gguf: Path) -> Iterator[RemoteEngine]:
        if find_spec("xllamacpp") is None:
            pytest.skip("xllamacpp is not installed: pip install 'calpaca[llama-cpp]'")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        command = [sys.executable, "-c", LLAMA_CPP, str(smollm2_gguf), str(port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            opened = RemoteEngine([read_address(process.stdout.readline().strip())])
            assert opened.capabilities().details["server"] == "llama_cpp"
            yield opened
            opened.close()
            process.kill()
