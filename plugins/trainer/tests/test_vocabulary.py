"""Vocabularies: merged as the published ones were, measured, trained, and a model that gets rows for the new tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402
from sentencepiece import SentencePieceProcessor  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

from calpaca.cli.main import main  # noqa: E402
from calpaca.core.checkpoint.verify import verify  # noqa: E402
from calpaca.core.errors import CorruptFileError, ModelError, ModelNotFoundError, UsageError  # noqa: E402
from calpaca.core.merge.base_model import read_base  # noqa: E402
from calpaca_trainer.errors import DataError  # noqa: E402
from calpaca_trainer.recipe import read_recipe  # noqa: E402
from calpaca_trainer.training import load_subject  # noqa: E402
from calpaca_trainer.vocabulary import FILTERS, MergedVocabulary, merge_vocabularies, old_pieces, read_pieces  # noqa: E402
from calpaca_trainer.vocabulary_model import Extension, plan_extension  # noqa: E402
from calpaca_trainer.vocabulary_report import measure  # noqa: E402
from calpaca_trainer.vocabulary_training import (  # noqa: E402
    VocabularyOptions,
    sentences,
    text_files,
    train_vocabulary,
)

EXAMPLES = Path(__file__).parents[3] / "examples"
DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def chinese() -> Path:
    """The 20,000 pieces that became Chinese-LLaMA's."""
    if not DATA.is_dir():
        pytest.skip("the shared test data (../shared/data) is not here")
    return DATA / "chinese_sp.model"


@pytest.fixture(scope="module")
def published(mistral_pieces: Path, chinese: Path) -> MergedVocabulary:
    """Chinese-LLaMA's merge, over a base of LLaMA's form: Meta's own pieces may not be passed on."""
    added = (piece.piece for piece in read_pieces(chinese).pieces)
    return merge_vocabularies(read_pieces(mistral_pieces), added)


# ---- merging --------------------------------------------------------------------------------------------------------


def length(number: int) -> bytes:
    """A number as protocol buffers write it."""
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + length(number // 128)


def test_every_byte_follows_from_both_files(mistral_pieces: Path, chinese: Path, published: MergedVocabulary) -> None:
    """The base's bytes, with each new piece as text (field 1) and score (field 2) between its pieces and the rest."""
    data, base = mistral_pieces.read_bytes(), read_pieces(mistral_pieces)
    known, written = {piece.piece for piece in base.pieces}, b""
    for piece in read_pieces(chinese).pieces:
        if piece.piece not in known:
            text = piece.piece.encode()
            entry = b"\x0a" + length(len(text)) + text + b"\x15" + bytes(4)
            written += b"\x0a" + length(len(entry)) + entry
    end = len(type(base)(pieces=base.pieces).SerializeToString())
    assert published.data == data[:end] + written + data[end:]


def test_the_published_facts_that_do_not_hang_on_the_base_hold(tmp_path: Path, published: MergedVocabulary) -> None:
    """Numbers of shared/reference: digit strings, pieces that begin with a space, tokens of doc.txt, the last piece."""
    assert len(published.added) + published.known == 20_000
    assert published.added[-1] == "儡"
    assert (published.traits()["digits"], published.traits()["space"]) == (304, 236)
    (tmp_path / "tokenizer.model").write_bytes(published.data)
    processor = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert processor.encode("1234567890", out_type=str) == ["▁12", "34", "56", "78", "90"]
    found = measure([tmp_path], [DATA / "doc.txt"])[0]
    assert (found.characters, found.tokens, found.difference) == (2154, 1800, None)
    assert round(found.tokens_per_character, 3) == 0.836


def test_the_chinese_pieces_alone_do_not_bring_a_text_back(chinese: Path) -> None:
    assert measure([chinese], [DATA / "doc.txt"])[0].difference is not None


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_leaves_out_what_it_says(mistral_pieces: Path, chinese: Path, published: Any, name: str) -> None:
    added = [piece.piece for piece in read_pieces(chinese).pieces]
    merged = merge_vocabularies(read_pieces(mistral_pieces), added, filters=[name])
    assert merged.traits()[name] == 0
    assert merged.left_out == {name: published.traits()[name]}
    assert list(merged.added) == [piece for piece in published.added if not FILTERS[name](piece)]


@pytest.mark.parametrize(
    ("piece", "names"),
    [("但", []), ("2016", ["digits", "non-cjk"]), ("▁12", ["digits", "non-cjk", "space"]), ("。<", ["html", "non-cjk"]),
     ("&#34;", ["html", "non-cjk"]), ("▁中国", ["space"]), ("100年", []), ("𠮷", [])],
)  # fmt: skip
def test_filters_by_example(piece: str, names: list[str]) -> None:
    assert [name for name, takes in FILTERS.items() if takes(piece)] == names


def test_tokens_come_last_and_only_once(pieces: Path) -> None:
    base = read_pieces(pieces)
    merged = merge_vocabularies(base, ["很好", "很好", base.pieces[300].piece], tokens=["[PAD]"])
    assert merged.added == ("很好", "[PAD]")
    assert merged.known == 1
    with pytest.raises(UsageError, match="has '很好' already"):
        merge_vocabularies(base, ["很好"], tokens=["很好"])


def test_what_is_no_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        read_pieces(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(CorruptFileError, match="no SentencePiece model"):
        read_pieces(tmp_path)


def test_the_folder_gives_the_same_ids_at_hugging_face(pieces: Path, added: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "merged"
    typed = ["vocab", "merge", str(pieces), str(added), "--output", str(output), "--add-token", "[PAD]"]
    assert main(typed) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(output)
    assert "2,000 pieces become" in told.err
    processor = SentencePieceProcessor(model_file=str(output / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(output)
    for text in (EXAMPLES / "handbook.zh.md").read_text("utf-8").splitlines():
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    assert tokenizer.pad_token_id == len(processor) - 1
    assert main(typed) == 2
    assert "exists already" in capsys.readouterr().err


# ---- a model with a longer vocabulary -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Chinese vocabulary."""
    data = train_vocabulary([EXAMPLES / "handbook.zh.md"], VocabularyOptions(size=500, kind="bpe", coverage=0.98))
    file = tmp_path_factory.mktemp("added") / "chinese.model"
    file.write_bytes(data)
    return file


def save_model(folder: Path, pieces: Path, **config: Any) -> Path:
    torch.manual_seed(0)
    settings = {"vocab_size": 2000, "tie_word_embeddings": False} | config
    LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, **settings)
    ).to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((pieces / "tokenizer.model").read_bytes())
    return folder


@pytest.mark.parametrize(("config", "ends"), [
    ({}, ["model.embed_tokens.weight", "lm_head.weight"]),
    ({"tie_word_embeddings": True}, ["model.embed_tokens.weight"]),
    ({"vocab_size": 2048}, ["model.embed_tokens.weight", "lm_head.weight"]),
], ids=["untied", "tied", "filled-up"])  # fmt: skip
def test_new_rows_are_the_means_of_the_old_pieces(
    pieces: Path, added: Path, tmp_path: Path, capsys, config: dict[str, Any], ends: list[str]
) -> None:
    model = save_model(tmp_path / "model", pieces, **config)
    output = tmp_path / "longer"
    typed = ["vocab", "merge", str(model), str(added), "--model", str(model), "--output", str(output), "--json"]
    assert main(typed) == 0
    facts = json.loads(capsys.readouterr().out)
    before, after = load_file(model / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    base = SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    new = SentencePieceProcessor(model_file=str(output / "tokenizer.model"))
    assert len(new) == facts["after"] == 2000 + facts["added"] > 2010
    for name in ends:
        assert after[name].shape == (len(new), 64)
        assert torch.equal(after[name][:2000], before[name][:2000])
        for index in range(2000, len(new)):
            text = new.id_to_piece(index).replace("▁", " ")
            ids = base.encode(f"a{text}")[len(base.encode("a")) :]
            assert torch.equal(after[name][index], before[name][ids].float().mean(0).to(torch.bfloat16))
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - set(ends))
    assert verify(output).passed
    loaded = LlamaForCausalLM.from_pretrained(output)
    assert loaded.config.vocab_size == len(new)
    ids = torch.tensor([[1, 5, 900, 33]])
    with torch.inference_mode():
        old = LlamaForCausalLM.from_pretrained(model)(ids).logits
        assert torch.equal(loaded(ids).logits[..., :2000], old[..., :2000])


def test_a_model_and_a_vocabulary_that_do_not_belong_together_are_refused(
    pieces: Path, mistral_pieces: Path, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", pieces)
    other = read_pieces(mistral_pieces)
    with pytest.raises(ModelError, match="has 2000 embedding rows, but the base vocabulary 32000 pieces"):
        plan_extension(model, Extension(other, merge_vocabularies(other, ["很好"])), "model")
    shorter = read_pieces(pieces)
    del shorter.pieces[-1]
    with pytest.raises(ModelError, match="is not the one of"):
        plan_extension(model, Extension(shorter, merge_vocabularies(shorter, ["很好"])), "model")


def test_characters_without_a_piece_begin_as_the_mean_of_their_bytes(pieces: Path) -> None:
    base = read_pieces(pieces)
    ids = old_pieces(base, ["𠮷"])[0]
    assert [base.pieces[index].piece for index in ids] == [f"<0x{byte:02X}>" for byte in "𠮷".encode()]


# ---- training and measuring -----------------------------------------------------------------------------------------


def test_a_trained_vocabulary_writes_its_texts(tmp_path: Path, capsys) -> None:
    typed = ["vocab", "train", str(EXAMPLES), "--vocab-size", "800", "--coverage", "0.98", "--byte-fallback",
             "--normalization", "identity", "--output", str(tmp_path / "my.model")]  # fmt: skip
    assert main(typed) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "my.model")
    assert main(["vocab", "report", str(tmp_path / "my.model"), "--text", str(EXAMPLES / "handbook.md"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["pieces"] == 800
    assert 0 < row["tokens_per_character"] < 1
    assert main(["vocab", "report", str(tmp_path / "my.model"), "--text", str(EXAMPLES / "handbook.md")]) == 0
    assert "TOKENS" in capsys.readouterr().out
    assert main(typed) == 2


def test_texts_are_read_line_by_line_and_long_lines_are_cut(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("第一行\n\n" + "长" * 3000 + "\n", "utf-8")
    (tmp_path / "a.md").write_text("first\n", "utf-8")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    files = text_files([tmp_path])
    assert [file.name for file in files] == ["a.md", "b.txt"]
    found = list(sentences(files))
    assert found[:2] == ["first", "第一行"]
    assert "".join(found[2:]) == "长" * 3000
    assert all(len(text.encode()) <= 4000 for text in found)


def test_texts_that_cannot_be_read_and_sizes_that_cannot_be_are_named(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"good\n" + "caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"Line 2 of .*latin.txt is no UTF-8"):
        train_vocabulary([file], VocabularyOptions(size=50))
    with pytest.raises(DataError, match="holds no text"):
        text_files([tmp_path / "nothing"])
    with pytest.raises(UsageError, match="cannot make 9000 pieces"):
        train_vocabulary([EXAMPLES / "handbook.md"], VocabularyOptions(size=9000))


# ---- which tokenizer may be trained with which model ---------------------------------------------------------------


@pytest.fixture(scope="module")
def lengths(pieces: Path, added: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models as LLaMA, Chinese-LLaMA and Chinese-Alpaca (one token more) are to each other, each with its tokenizer."""
    folder = tmp_path_factory.mktemp("lengths")
    base = read_pieces(pieces)
    new = [piece.piece for piece in read_pieces(added).pieces]
    merged = {"llama": b"", "chinese": merge_vocabularies(base, new).data, "alpaca": b""}
    merged["llama"] = base.SerializeToString()
    merged["alpaca"] = merge_vocabularies(base, new, tokens=["[PAD]"]).data
    made = {}
    for name, data in merged.items():
        (folder / f"{name}-pieces").mkdir()
        (folder / f"{name}-pieces" / "tokenizer.model").write_bytes(data)
        size = len(SentencePieceProcessor(model_proto=data))
        made[name] = save_model(folder / name, folder / f"{name}-pieces", vocab_size=size)
        settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (made[name] / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return made


@pytest.mark.parametrize(
    ("model", "tokenizer", "told"),
    [
        ("llama", "llama", None), ("chinese", "chinese", None), ("alpaca", "alpaca", None), ("alpaca", None, None),
        ("llama", "chinese", "rows"), ("llama", "alpaca", "rows"), ("chinese", "alpaca", "rows"),
        ("chinese", "llama", "own"), ("alpaca", "llama", "own"), ("alpaca", "chinese", "own"),
    ],
)  # fmt: skip
def test_a_tokenizer_of_another_model_is_refused_with_both_sizes(
    lengths: dict[str, Path], runtime, tmp_path: Path, model: str, tokenizer: str | None, told: str | None
) -> None:
    """Every pair of the seed's three sizes: 32000, 49953 and 49954."""
    typed = {"model": str(lengths[model]), "tokenizer": tokenizer and str(lengths[tokenizer])}
    recipe = read_recipe(None, {**typed, "chat_template": "alpaca", "device": "cpu"}, "train sft")
    if told is None:
        files, prompting = load_subject(recipe, runtime)
        assert len(prompting.tokenizer) == read_base(files.weights).tensors["model.embed_tokens.weight"].shape[0]
        return
    with pytest.raises(ModelError) as caught:
        load_subject(recipe, runtime)
    sizes = {name: len(read_pieces(folder).pieces) for name, folder in lengths.items()}
    assert f"has {sizes[tokenizer or model]} tokens" in caught.value.message
    wanted = {"rows": f"only {sizes[model]} embedding rows", "own": f"has {sizes[model]}: it would"}
    assert wanted[told] in caught.value.message
    assert "--tokenizer" in caught.value.hint


def test_a_tokenizer_of_another_kind_is_named(small: Path, added: Path, tmp_path: Path, capsys) -> None:
    assert main(["vocab", "merge", str(small), str(added), "--output", str(tmp_path / "merged")]) == 2
    assert "no SentencePiece model but one of another kind (tokenizer.json)" in capsys.readouterr().err
