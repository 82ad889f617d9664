"""Tokenizers: SentencePiece's own ids on a vocabulary that was merged after training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calpaca.core.engine import Grammar
from calpaca.core.errors import CorruptFileError, ModelError, UnsupportedError, UsageError
from calpaca.core.grammar import GrammarCompiler
from calpaca.core.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared test data (../shared/data) is not here")


@pytest.fixture(scope="module")
def merged_tokenizer(merged: Path) -> Tokenizer:
    return load_tokenizer(merged)


@needs_data
@pytest.mark.slow
def test_a_merged_vocabulary_gives_the_ids_of_sentencepiece(merged: Path, merged_tokenizer: Tokenizer) -> None:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(merged / "tokenizer.model"))
    texts = [
        p["context"] for a in json.loads((DATA / "cmrc2018_trial.json").read_text())["data"] for p in a["paragraphs"]
    ]
    assert len(texts) == 256
    assert len(merged_tokenizer) == len(pieces) > 45_000
    for text in texts:
        assert merged_tokenizer.encode(text) == pieces.encode(text)
        assert merged_tokenizer.decode(merged_tokenizer.encode(text)) == pieces.decode(pieces.encode(text))


@needs_data
@pytest.mark.slow
def test_special_tokens_in_a_text_become_their_ids_and_bos_is_added_when_asked_for(merged_tokenizer: Tokenizer) -> None:
    assert merged_tokenizer.encode("</s>") == [2]
    assert merged_tokenizer.encode("但", special_tokens=True)[0] == 1
    assert merged_tokenizer.decode([1, *merged_tokenizer.encode("李白"), 2]) == "李白"
    assert merged_tokenizer.special_tokens["bos_token"] == "<s>"


@needs_data
@pytest.mark.slow
def test_added_tokens_have_ids_after_the_pieces(merged: Path, merged_tokenizer: Tokenizer, tmp_path: Path) -> None:
    size = len(merged_tokenizer)
    (tmp_path / "tokenizer.model").write_bytes((merged / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert len(tokenizer) == size + 1
    assert tokenizer.encode("[PAD]") == [size]


@needs_data
@pytest.mark.slow
def test_a_sentencepiece_vocabulary_can_be_constrained(merged_tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(merged_tokenizer, len(merged_tokenizer), [2])
    matcher = compiler.compile(Grammar("json_schema", {"type": "object", "properties": {"名": {"type": "string"}}}))
    for character in '{"名": "李白"}':
        token = merged_tokenizer.token_id(character.replace(" ", "▁"))
        assert matcher.allowed()[token]
        matcher.accept(token)
    assert matcher.finished or matcher.allowed()[2]


def test_a_tokenizer_without_sentencepiece_is_the_one_of_transformers(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    text = "Hello 你好 <|im_start|>user"
    assert load_tokenizer(smollm2).encode(text) == AutoTokenizer.from_pretrained(smollm2).encode(text)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_damaged_sentencepiece_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x00garbage" * 40)
    with pytest.raises(CorruptFileError, match=r"tokenizer\.model is no SentencePiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("grammar", "error"),
    [
        (Grammar("json_schema", {"type": "array", "uniqueItems": True}), UnsupportedError),
        (Grammar("regex", "(["), UsageError),
        (Grammar("lark", "start: ("), UsageError),
    ],
)
def test_a_grammar_that_cannot_be_used_says_why(smollm2: Path, grammar: Grammar, error: type[Exception]) -> None:
    tokenizer = load_tokenizer(smollm2)
    with pytest.raises(error, match="cannot be used"):
        GrammarCompiler(tokenizer, len(tokenizer), [2]).compile(grammar)
