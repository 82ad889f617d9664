"""Rerankers: cross-encoders, which read a question and a passage together and say how well the one answers the other."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from calpaca.core.errors import MissingExtraError, ModelError
from calpaca.core.fingerprint import file_digest, fingerprint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BATCH = 16
_MOST_TOKENS = 512
_ONNX_FILES = ("model.onnx", "onnx/model.onnx")
_HINT = "Name a sequence-classification model with one label with --rerank."


@runtime_checkable
class Reranker(Protocol):
    """What scores passages for a question. `languages` as in the catalogue, empty where they are not known."""

    name: str
    languages: str

    @property
    def fingerprint(self) -> str:
        """Digest of the weights."""
        ...

    def scores(self, question: str, texts: Sequence[str]) -> NDArray[np.float32]:
        """[len(texts)], higher is better. The scale is the model's own."""
        ...


def open_reranker(name: str, path: Path, device: str = "auto", languages: str = "") -> Reranker:
    """The reranker in a folder: PyTorch weights where it has them, else `model.onnx` beside a `tokenizer.json`.

    Raises ModelError when it is none, MissingExtraError without the library that runs it.
    """
    file = next((path / name for name in _ONNX_FILES if (path / name).is_file()), None)
    if file is not None and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        return OnnxReranker(name, file, path / "tokenizer.json", languages)
    return TorchReranker(name, path, device, languages)


class TorchReranker:
    """A Hugging Face folder with a sequence-classification head of one label, run by sentence-transformers.

    Raises ModelError when the folder is no such model: on another model the library would put a head of random numbers.
    """

    def __init__(self, name: str, path: Path, device: str = "auto", languages: str = "") -> None:
        try:
            import sentence_transformers
        except ModuleNotFoundError as error:
            raise MissingExtraError("A reranker", "torch", error.name or "sentence_transformers") from error
        from calpaca.core.weights import quiet_transformers

        self.name = name
        self.path = path
        self.languages = languages
        _check_head(path)
        try:
            with quiet_transformers():
                self._model: Any = sentence_transformers.CrossEncoder(
                    str(path), device=None if device == "auto" else device, local_files_only=True,
                    model_kwargs={"dtype": "float32"},
                )  # fmt: skip
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{path} is no reranker: {error}.", _HINT) from error
        if self._model.num_labels != 1:
            raise ModelError(f"{path} tells {self._model.num_labels} labels apart and scores nothing.", _HINT)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.path)

    def scores(self, question: str, texts: Sequence[str]) -> NDArray[np.float32]:
        import numpy as np

        pairs = [(question, text) for text in texts]
        found = self._model.predict(pairs, batch_size=_BATCH, show_progress_bar=False) if pairs else []
        return np.asarray(found, np.float32)


def _check_head(path: Path) -> None:
    try:
        kinds = json.loads((path / "config.json").read_text("utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} is no reranker: {error}.", _HINT) from error
    if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        raise ModelError(f"{path} is no reranker, but {', '.join(map(str, kinds)) or 'of no known kind'}.", _HINT)


class OnnxReranker:
    """An ONNX file with the inputs of BERT and one logit for each pair, run by onnxruntime on the processor."""

    def __init__(self, name: str, file: Path, tokenizer: Path, languages: str = "") -> None:
        """Raises ModelError when a file is missing, damaged or of another kind."""
        try:
            import onnxruntime
            import tokenizers
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"The reranker {name}", "onnx", error.name or "onnxruntime") from error

        self.name = name
        self.languages = languages
        self._files = (file, tokenizer)
        options = onnxruntime.SessionOptions()
        asked = os.environ.get("OMP_NUM_THREADS", "")  # onnxruntime does not read it; 0 is its own choice
        options.intra_op_num_threads = int(asked) if asked.isdecimal() else 0
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            self._tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # both libraries raise classes of their own
            raise ModelError(f"The reranker {file} cannot be opened: {error}.", _HINT) from error
        self._inputs = {each.name for each in self._session.get_inputs()}
        if self._session.get_outputs()[0].shape[-1] != 1:
            raise ModelError(f"{file} gives no single score for a pair.", _HINT)
        self._tokenizer.enable_truncation(_MOST_TOKENS)
        self._tokenizer.enable_padding()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(map(file_digest, self._files)).encode()).hexdigest()

    def scores(self, question: str, texts: Sequence[str]) -> NDArray[np.float32]:
        import numpy as np

        scores = np.zeros(len(texts), np.float32)
        ordered = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # like lengths: less padding
        for start in range(0, len(ordered), _BATCH):
            places = ordered[start : start + _BATCH]
            scores[places] = self._logits([(question, texts[place]) for place in places])
        return scores

    def _logits(self, pairs: list[tuple[str, str]]) -> NDArray[np.float32]:
        """[len(pairs)]"""
        import numpy as np

        encoded = self._tokenizer.encode_batch(pairs)
        arrays = {
            "input_ids": np.array([each.ids for each in encoded], np.int64),
            "attention_mask": np.array([each.attention_mask for each in encoded], np.int64),
            "token_type_ids": np.array([each.type_ids for each in encoded], np.int64),
        }
        given = {name: array for name, array in arrays.items() if name in self._inputs}
        logits = self._session.run(None, given)[0]
        found: NDArray[np.float32] = np.asarray(logits, np.float32).reshape(len(pairs))
        return found
