"""The chat in a browser: textual-serve on the loopback address, behind a token, with one engine for all visitors.

textual-serve starts a program for each visitor, asks for nothing and takes a websocket from any page's script. So every
request must show the token, as a cookie once the first address has brought it, and name this host and, from a script,
this origin. The page loads nothing from elsewhere.
"""

from __future__ import annotations

import hmac
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from aiohttp import web
from textual_serve.server import Server

from calpaca.core.errors import ModelError
from calpaca.core.paths import data_dir

_HOST = "127.0.0.1"
_COOKIE = "calpaca_chat"
_PAGE = Path(__file__).with_name("web_page")
_POLICY = "default-src 'self' 'unsafe-inline' data:; connect-src 'self' ws:; frame-ancestors 'none'"
_PATIENCE = 600.0
"""Seconds that loading the model may take."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ChatServer(Server):
    """Serves `command`, one process for each visitor. `token` is what a visitor must know."""

    def __init__(self, command: Sequence[str], port: int, token: str) -> None:
        self._socket = socket.create_server((_HOST, port))
        chosen = self._socket.getsockname()[1]
        super().__init__(shlex.join(command), _HOST, chosen, title="calpaca", templates_path=_PAGE)
        self._token = token
        self.address = f"{self.public_url}/?token={token}"

    def serve(self, debug: bool = False) -> None:
        """Until Ctrl-C or SIGTERM; visitors' programs end with it."""
        self.debug = debug
        web.run_app(self._make_app(), sock=self._socket, print=lambda *_: None, shutdown_timeout=1.0)

    async def on_startup(self, app: web.Application) -> None:  # noqa: ARG002  # textual-serve's signature
        """Say where the chat is."""
        sys.stderr.write(f"The chat is at {self.address}\nCtrl-C ends it.\n")
        sys.stderr.flush()

    async def _make_app(self) -> web.Application:
        app = await super()._make_app()
        app.middlewares.append(self._guard)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        brought = request.query.get("token", "")
        if not self._is_from_here(request) or not self._knows(brought or request.cookies.get(_COOKIE, "")):
            raise web.HTTPForbidden(text="This chat opens by the address that `calpaca chat --web` printed.\n")
        if brought and request.path == "/":  # the token leaves the address, and with it the history
            moved = web.HTTPFound("/")
            moved.set_cookie(_COOKIE, self._token, httponly=True, samesite="Strict")
            raise moved
        response = await handler(request)
        if not response.prepared:
            response.headers["Content-Security-Policy"] = _POLICY
        return response

    def _is_from_here(self, request: web.Request) -> bool:
        """Whether the request names this server, and a script's page is this server's."""
        here = self.public_url.removeprefix("http://")
        return request.host == here and request.headers.get("Origin", self.public_url) == self.public_url

    def _knows(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._token.encode())


def serve_chat(visitor: Sequence[str], engine: Sequence[str], port: int) -> None:
    """Serve a chat until it is stopped. `visitor` are the arguments of each visitor's `calpaca chat`, `engine` those of the
    one `calpaca serve` that they all ask; empty where a server elsewhere has the model.

    Raises ModelError when the model cannot be loaded.
    """
    server = ChatServer([sys.executable, "-m", "calpaca", "chat", *visitor], port, secrets.token_urlsafe(24))
    if not engine:
        server.serve()
        return
    with _engine(engine):
        server.serve()


@contextmanager
def _engine(arguments: Sequence[str]) -> Iterator[None]:
    """A `calpaca serve` of ours with a key of its own, announced to the visitors' programs."""
    with TemporaryDirectory() as folder:
        key, log = Path(folder) / "key", Path(folder) / "log"
        key.touch(0o600)
        key.write_text(secrets.token_urlsafe(24), encoding="ascii")
        command = [sys.executable, "-m", "calpaca", "serve", "--port", "0", "--drain", "1", "--api-key-file", str(key)]
        with log.open("wb") as said:
            process = subprocess.Popen(  # noqa: S603  # our own interpreter
                [*command, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
            )
        try:
            _wait_until_announced(process, log)
            yield
        finally:
            process.terminate()
            process.wait()


def _wait_until_announced(process: subprocess.Popen[bytes], log: Path) -> None:
    announcement, until = data_dir() / "servers" / f"{process.pid}.json", time.monotonic() + _PATIENCE
    while not announcement.exists():
        if process.poll() is not None:
            said = log.read_text("utf-8", errors="replace").strip()
            raise ModelError("The engine of the chat did not start.", said or "Try: calpaca serve")
        if time.monotonic() > until:
            raise ModelError(f"The engine of the chat is not there after {_PATIENCE:.0f} s.", "Try a smaller model.")
        time.sleep(0.05)
