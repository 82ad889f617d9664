"""The process that serves: its socket, and an end that lets running answers end first."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from calpaca.core.errors import UsageError
from calpaca_openai_api.server import Api
from calpaca_openai_api.settings import ServeOptions

_BACKLOG = 2048

_SWITCH_SECONDS = 0.0005
"""How long a thread may keep the interpreter from the others. Python's 5 ms is what a request would wait for, several
times, beside an engine that is at work."""


def open_socket(host: str, port: int) -> socket.socket:
    """Listen, before anything is loaded. Raises UsageError where that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise UsageError(f"{host}:{port} cannot be listened on: {error}.", "Choose another with --port.") from error


def run(server: Server, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; then take no more requests, and let running ones end."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    asyncio.run(server.serve(sockets=[listener]))


class Server(uvicorn.Server):
    """uvicorn's server, which ends with 0 when it is told to end."""

    def __init__(self, app: ASGIApp, api: Api, options: ServeOptions) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(options.drain)),
                ssl_certfile=options.tls_cert,
                ssl_keyfile=options.tls_key,
            )
        )
        self._api = api
        self._drain = options.drain

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but the signals are not raised once more at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread gets signals
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers end first, those that are made in the background too."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._drain
        await super().shutdown(sockets)
        await self._api.background.end(0.0 if self.force_exit else max(0.0, end - loop.time()))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._api.admission.draining = True
        super().handle_exit(sig, frame)
