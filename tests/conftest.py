"""Vocabularies of SentencePiece: one that was merged from LLaMA-like pieces, and a small one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


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
