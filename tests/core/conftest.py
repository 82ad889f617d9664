"""A web server on this machine that can be told to misbehave, and a cache of one's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass
class WebServer:
    """Serves `files` by path. `cut` closes the connection after that many bytes, once for each entry."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)
    knows_ranges: bool = True
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)


def _handler(server: WebServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            wanted = self.headers.get("Range")
            server.requests.append((self.command, path, wanted))
            body = server.files.get(path)
            if body is None:
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and server.knows_ranges else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Type", server.types.get(path, "application/octet-stream"))
            self.send_header("Content-Length", str(len(body) - start))
            for name, value in server.headers.get(path, {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[start:][: server.cut.pop(0) if server.cut else None])

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def web() -> Iterator[WebServer]:
    """A server on 127.0.0.1."""
    server = WebServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(server)) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        http.shutdown()
        thread.join()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("CALPACA_CACHE", str(cache))
    return cache
