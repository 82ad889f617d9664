"""Vocabularies of SentencePiece: one of 32,000 pieces as LLaMA's, those that were merged from it, and a small one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from calpaca.core.catalogue import WheelFile
from calpaca.core.errors import DownloadError
from calpaca.core.paths import cache_dir
from calpaca.core.wheels import _extract

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"

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
