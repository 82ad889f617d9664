"""Embeddings from an OpenAI-compatible server: for machines without torch, and models that run elsewhere."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx

from calpaca.core.engines.remote.address import find_servers, read_api_key
from calpaca.core.engines.remote.client import client_options, reason, silent
from calpaca.core.engines.remote.dialect import DIALECTS
from calpaca.core.engines.remote.endpoints import backoff
from calpaca.core.engines.remote.estimate import estimated_tokens
from calpaca.core.engines.remote.refusal import Asked, PassingError, refusal
from calpaca.core.errors import ModelError, UsageError
from calpaca.core.settings import RemoteSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class RemoteEmbedder:
    """An `Embedder` named `http://host:8000/v1#name`. The server does not say how much of a text it reads: 512 tokens
    are taken for granted, and counted by estimate. Raises ModelError when it does not answer."""

    batch_size = 32
    max_tokens = 512

    def __init__(self, reference: str, settings: RemoteSettings) -> None:
        (self._address,), model = find_servers(reference, settings)
        if model is None:
            raise UsageError(
                f"{self._address.shown} names no model.", f"Put its name behind '#': {self._address.shown}#name"
            )
        self.name = model
        self._settings = settings
        self._secret = read_api_key(settings)
        self.dimensions = int(self.embed_query("dimensions").shape[0])

    @property
    def fingerprint(self) -> str:
        """Of name and address: the weights are not seen here."""
        return hashlib.sha256(f"remote {self._address.shown}#{self.name}".encode()).hexdigest()

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        import numpy as np

        if not texts:
            return np.zeros((0, self.dimensions), np.float32)
        batches = [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]
        with httpx.Client(**client_options(self._settings, self._secret)) as client:
            rows = [row for batch in batches for row in self._ask(client, batch)]
        vectors = np.asarray(rows, dtype=np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        return vectors

    def embed_query(self, text: str) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self.embed_documents([text])[0]
        return vector

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [estimated_tokens(text) for text in texts]

    def _ask(self, client: httpx.Client, texts: Sequence[str]) -> list[list[float]]:
        """Vectors in the order of the texts."""
        body = {"model": self.name, "input": list(texts), "encoding_format": "float"}
        for attempt in range(1, self._settings.retries + 2):
            try:
                return _vectors(self._post(client, body), len(texts), self._address.shown)
            except PassingError as error:
                if attempt > self._settings.retries:
                    raise ModelError(
                        f"The server {self._address.shown} gives no embeddings: {error.reason}.", "Is it running?"
                    ) from error
                time.sleep(backoff(attempt) if error.wait is None else min(error.wait, 60.0))
        raise AssertionError("unreachable")

    def _post(self, client: httpx.Client, body: Mapping[str, Any]) -> Any:
        shown = self._address.shown
        try:
            response = client.post(f"{self._address.url}/embeddings", json=body)
        except httpx.ReadTimeout as error:
            raise silent(shown, self._settings.timeout) from error
        except httpx.TransportError as error:
            raise PassingError(reason(error)) from error
        if response.status_code != httpx.codes.OK:
            asked = Asked(shown, body, DIALECTS["openai"], self._secret)
            raise refusal(response.status_code, response.headers, response.content, asked)
        try:
            return response.json()
        except ValueError as error:
            raise ModelError(f"The server {shown} sent no JSON.", "Does its address end with /v1?") from error


def _vectors(answer: Any, count: int, shown: str) -> list[list[float]]:
    try:
        rows = sorted(answer["data"], key=lambda row: row["index"])
        vectors = [[float(value) for value in row["embedding"]] for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"The server {shown} sent no embeddings.", "Does it serve an embedding model?") from error
    if len(vectors) != count or len({len(vector) for vector in vectors}) != 1:
        raise ModelError(f"The server {shown} sent {len(vectors)} vectors for {count} texts.", "Look at its log.")
    return vectors
