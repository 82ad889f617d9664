"""The Qdrant store over HTTP.

No package brings a Qdrant server, so this one speaks the part of its REST interface that the store uses
(https://api.qdrant.tech) and hands each request to the client's own engine in memory. It proves what our side sends and
reads, the key included; what a real server makes of it is not proven.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from calpaca.core.errors import DocumentError

qdrant = pytest.importorskip("calpaca.documents.stores.qdrant", reason="needs calpaca[qdrant]")

from qdrant_client import QdrantClient, models  # noqa: E402  # after the skip

KEY = "a key"


class QdrantServer(ThreadingHTTPServer):
    """A server with one engine. `sizes` are the numbers of points that each upsert brought."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine = QdrantClient(":memory:")
        self.busy = threading.Lock()
        self.sizes: list[int] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: QdrantServer
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        path = self.path.partition("?")[0]
        if self.headers.get("api-key") != KEY:
            self.answer(401, {"status": {"error": "Must provide an API key"}})
            return
        with self.server.busy:
            result = self.result(path, body)
        self.answer(200, {"result": result, "status": "ok", "time": 0.0})

    do_GET = do_PUT = do_POST = handle_request

    def result(self, path: str, body: dict[str, Any]) -> Any:
        found = re.fullmatch(r"/collections/([^/]+)(/.*)?", path)
        assert found is not None, path
        engine, name, action = self.server.engine, found[1], found[2]
        match self.command, action:
            case "GET", "/exists":
                return {"exists": engine.collection_exists(name)}
            case "PUT", None:
                return engine.create_collection(name, models.VectorParams(**body["vectors"]))
            case "PUT", "/points":
                points = [models.PointStruct(**point) for point in body["points"]]
                self.server.sizes.append(len(points))
                return dumped(engine.upsert(name, points))
            case "POST", "/points/delete":
                return dumped(engine.delete(name, models.PointIdsList(points=body["points"])))
            case "POST", "/points":
                return [dumped(each) for each in engine.retrieve(name, body["ids"], with_payload=True)]
            case "POST", "/points/query":
                vector, rows = body["query"]["nearest"], bool(body.get("with_vector"))
                return dumped(engine.query_points(name, vector, limit=body["limit"], with_vectors=rows))
        raise AssertionError(f"{self.command} {path}")

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def dumped(value: Any) -> Any:
    return value.model_dump(mode="json")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[QdrantServer]:
    with QdrantServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv(qdrant.URL, running.url)
        monkeypatch.setenv(qdrant.KEY, KEY)
        yield running
        running.shutdown()
        thread.join()
        running.engine.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
class TestQdrantStoreOverHttp(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, server: QdrantServer, tmp_path: Path) -> Iterator[VectorStore]:
        store = qdrant.open_store(tmp_path / "index" / "qdrant", self.get_embeddings())
        yield store
        store.client.close()


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_an_index_on_a_server_is_filled_in_batches_searched_and_missed(
    server: QdrantServer, tmp_path: Path, make_index, sync, monkeypatch
) -> None:
    (tmp_path / "foxes.txt").write_text("\n\n".join(f"The fox of house {n} likes dish {n}." for n in range(300)))
    index = make_index(tmp_path / "foxes.txt", store="qdrant")
    sync(index)
    assert server.sizes == [256, 44]
    ((document, score),) = index.store.similarity_search_with_score("The fox of house 7 likes dish 7.", k=1)
    assert (document.metadata["source"], score) == (str(tmp_path / "foxes.txt"), pytest.approx(1.0, abs=1e-5))
    assert index.retriever.invoke("The fox of house 9 likes dish 9.")[0].page_content.endswith("dish 9.")
    monkeypatch.setenv(qdrant.KEY, "another key")
    with pytest.raises(DocumentError, match=r"cannot be opened: 401") as raised:
        qdrant.open_store(tmp_path / "index" / "qdrant", VectorStoreIntegrationTests.get_embeddings())
    assert qdrant.KEY in raised.value.hint
    server.shutdown()
    server.server_close()
    with pytest.raises(DocumentError, match="cannot be used"):
        index.store.similarity_search_with_score("fox", k=1)
    index.store.client.close()
