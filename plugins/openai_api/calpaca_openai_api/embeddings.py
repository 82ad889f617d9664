"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from calpaca.core.embedding import Embedder
from calpaca_openai_api.bodies import EmbeddingBody
from calpaca_openai_api.faults import ApiError, unsupported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_INPUTS = 2048


async def embed(body: EmbeddingBody, embedder: Embedder) -> tuple[list[NDArray[np.float32]], int]:
    """A vector for each input, and the tokens of all. Work stops between two batches when nobody waits any more.

    Raises ApiError.
    """
    if body.dimensions not in (None, embedder.dimensions):
        raise unsupported("dimensions", f"the vectors of '{embedder.name}' have {embedder.dimensions}, no fewer.")
    texts = await asyncio.to_thread(_texts, body, embedder)
    counts = await asyncio.to_thread(embedder.count_tokens, texts)
    for index, count in enumerate(counts):
        if count > embedder.max_tokens:
            message = (
                f"This model's maximum context length is {embedder.max_tokens} tokens. However, input {index} has "
                f"{count}. Please shorten it."
            )
            raise ApiError(400, message, param="input", code="context_length_exceeded")
    # Texts of like length share a batch; the order of the inputs is restored.
    order = sorted(range(len(texts)), key=lambda index: counts[index])
    vectors: list[Any] = [None] * len(texts)
    for start in range(0, len(order), embedder.batch_size):
        batch = order[start : start + embedder.batch_size]
        rows = await asyncio.to_thread(embedder.embed_documents, [texts[index] for index in batch])
        for index, row in zip(batch, rows, strict=True):
            vectors[index] = row
    return vectors, sum(counts)


def _texts(body: EmbeddingBody, embedder: Embedder) -> list[str]:
    """The inputs as texts."""
    inputs = body.inputs
    if not inputs or any(not each for each in inputs):
        raise ApiError(400, "The input is empty.", param="input")
    if len(inputs) > MOST_INPUTS:
        raise ApiError(400, f"A request may have {MOST_INPUTS} inputs at most.", param="input")
    return [each if isinstance(each, str) else _decoded(each, embedder) for each in inputs]


def _decoded(token_ids: Sequence[int], embedder: Embedder) -> str:
    decode = getattr(embedder, "decode", None)
    if decode is None:
        raise unsupported("input", f"'{embedder.name}' takes text and no token ids.")
    text: str = decode(token_ids)
    return text


def embedding_response(body: EmbeddingBody, model: str, vectors: Sequence[Any], tokens: int) -> dict[str, Any]:
    """OpenAI's CreateEmbeddingResponse."""
    as_text = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _base64(vector) if as_text else vector.tolist()}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _base64(vector: NDArray[np.float32]) -> str:
    """Little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
