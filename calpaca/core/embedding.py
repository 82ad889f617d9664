"""Embedding models: texts in, unit vectors out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from calpaca.core.errors import MissingExtraError, ModelError, UsageError
from calpaca.core.fingerprint import fingerprint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@runtime_checkable
class Embedder(Protocol):
    """What turns texts into vectors, one float32 row of length `dimensions` each, of length 1.

    `batch_size` is how many texts at once suit it; `max_tokens` how much of a text it reads.
    """

    name: str
    dimensions: int
    max_tokens: int
    batch_size: int

    @property
    def fingerprint(self) -> str:
        """Digest of the weights: vectors of two fingerprints are never mixed."""
        ...

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[len(texts), dimensions]"""
        ...

    def embed_query(self, text: str) -> NDArray[np.float32]:
        """[dimensions]"""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by the model's own tokenizer, without special tokens."""
        ...


class SentenceTransformerEmbedder:
    """Any sentence-transformers folder: its own pooling, normalisation and prompts for queries and passages.

    Raises ModelError when the folder is no such model.
    """

    batch_size = 32

    def __init__(self, name: str, path: Path, device: str = "auto") -> None:
        try:
            import sentence_transformers
        except ModuleNotFoundError as error:
            raise MissingExtraError("An embedding model", "torch", error.name or "sentence_transformers") from error
        from calpaca.core.weights import quiet_transformers

        self.name = name
        self.path = path
        try:
            with quiet_transformers():
                self._model: Any = sentence_transformers.SentenceTransformer(
                    str(path),
                    device=None if device == "auto" else device,
                    local_files_only=True,
                    model_kwargs={"dtype": "float32"},
                )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{path} is no sentence-transformers model: {error}.", "Name a folder or id of one with --embedding."
            ) from error
        self.dimensions: int = self._model.get_embedding_dimension()
        self.max_tokens: int = self._model.max_seq_length or 512

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.path)

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode(self._model.encode_document, list(texts))

    def embed_query(self, text: str) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self._encode(self._model.encode_query, [text])[0]
        return vector

    def _encode(self, encode: Any, texts: list[str]) -> NDArray[np.float32]:
        import numpy as np

        vectors = encode(
            texts, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
        )
        return np.asarray(vectors, dtype=np.float32)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        encoded = self._model.tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids of the model's own tokenizer. Raises UsageError for an id that it does not have."""
        tokenizer = self._model.tokenizer
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < len(tokenizer):
            raise UsageError(
                f"Token id {max(token_ids)} is outside the vocabulary of {len(tokenizer)} of '{self.name}'.",
                "Use ids of this model's own tokenizer, or send text.",
            )
        text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text
