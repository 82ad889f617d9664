"""Tokenizers of converted models: the ids that the source gives, in the form that transformers reads."""

from __future__ import annotations

import base64
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from calpaca.core.convert.llama3_tokenizer import ranks_of, special_tokens
from calpaca.core.convert.tokenizer_files import find_tokenizer, hugging_face_tokenizer, original_tokenizer
from calpaca.core.errors import CorruptFileError, ModelNotFoundError
from calpaca.core.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
TEXTS = [
    "Hello, world!", " a leading space", "two  spaces\n\nand lines\t.", "1234567890 and 3.14", "李白（701年—762年），字太白。",
    "🧪 𠮷 ﷺ", "<s>[INST] 你好 [/INST] ok</s><s>", "", "naïve “quotes” …", "for (i = 0; i < 10; i++) {\n    x += i;\n}",
]  # fmt: skip


def loaded(folder: Path, texts: dict[str, bytes]) -> Any:
    """Write the files as a model folder has them, and load them as anybody would."""
    from transformers import AutoTokenizer

    folder.mkdir()
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return AutoTokenizer.from_pretrained(folder)


def paragraphs(file: str) -> list[str]:
    if not DATA.is_dir():
        pytest.skip("the shared test data (../shared/data) is not here")
    content = json.loads((DATA / file).read_text(encoding="utf-8"))
    return [paragraph["context"] for article in content["data"] for paragraph in article["paragraphs"]]


# ---- SentencePiece ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("file", ["cmrc2018_trial.json", "xquad_en_first24.json", "xquad_zh_first24.json"])
def test_a_merged_vocabulary_keeps_its_ids_at_hugging_face(merged: Path, tmp_path: Path, file: str) -> None:
    texts = hugging_face_tokenizer(merged)
    assert "tokenizer.json" not in texts  # none gives the same ids
    found, expected = loaded(tmp_path / "hf", texts), load_tokenizer(merged)
    for text in [*paragraphs(file), *TEXTS]:
        assert found.encode(text) == expected.encode(text, special_tokens=True)


@pytest.mark.slow
def test_the_usual_class_would_give_a_merged_vocabulary_other_ids(merged: Path, tmp_path: Path) -> None:
    """Why: transformers makes merges of the pieces, and merges have an order where pieces have equal scores."""
    texts = hugging_face_tokenizer(merged)
    config = json.loads(texts["tokenizer_config.json"]) | {"tokenizer_class": "LlamaTokenizer"}
    usual = loaded(tmp_path / "usual", texts | {"tokenizer_config.json": json.dumps(config).encode()})
    expected = load_tokenizer(merged)
    differing = [
        text
        for text in paragraphs("cmrc2018_trial.json")
        if usual.encode(text) != expected.encode(text, special_tokens=True)
    ]
    assert len(differing) > 100


@pytest.mark.slow
@pytest.mark.parametrize("file", ["cmrc2018_trial.json", "xquad_en_first24.json"])
def test_a_vocabulary_as_it_was_trained_gets_a_tokenizer_json_with_its_ids(
    mistral_pieces: Path, tmp_path: Path, file: str
) -> None:
    from tokenizers import Tokenizer

    texts = hugging_face_tokenizer(mistral_pieces)
    found = loaded(tmp_path / "hf", texts)
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "tokenizer.model").write_bytes(mistral_pieces.read_bytes())
    expected = load_tokenizer(tmp_path / "pieces")
    fast = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for text in [*paragraphs(file), *TEXTS]:
        assert found.encode(text) == fast.encode(text).ids == expected.encode(text, special_tokens=True)
        plain = expected.encode(text)
        assert found.decode(plain, skip_special_tokens=True).strip() == expected.decode(plain).strip() or "<s>" in text


def test_pieces_that_users_defined_keep_their_ids(small_pieces: Path, tmp_path: Path) -> None:
    found = loaded(tmp_path / "hf", hugging_face_tokenizer(small_pieces))
    expected = load_tokenizer(small_pieces)
    for text in ["a<|turn|>b <|turn|> c", "observatory telescopes", *TEXTS]:
        assert found.encode(text) == expected.encode(text, special_tokens=True)


def test_settings_of_the_source_are_kept(small_pieces: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes((small_pieces / "tokenizer.model").read_bytes())
    size = len(load_tokenizer(small_pieces))
    (source / "added_tokens.json").write_text(json.dumps({"[PAD]": size}))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "pad_token": "[PAD]", "add_bos_token": False, "chat_template": "{{ x }}",
                    "legacy": False, "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}})
    )  # fmt: skip
    files = find_tokenizer(source)
    assert files.size == size + 1
    assert files.special_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": size}
    found = loaded(tmp_path / "hf", dict(files.texts))
    assert found.encode("x[PAD]") == load_tokenizer(source).encode("x[PAD]", special_tokens=True)
    assert found.encode("x[PAD]")[-1] == size
    assert found.chat_template == "{{ x }}"
    assert "auto_map" not in json.loads(files.texts["tokenizer_config.json"])
    again = tmp_path / "hf"
    assert load_tokenizer(again).encode("x[PAD]") == load_tokenizer(source).encode("x[PAD]")


@pytest.mark.slow
def test_the_padding_piece_of_chinese_alpaca_is_its_pad_token(merged: Path, tmp_path: Path) -> None:
    """Its tokenizer_config.json says null; its special tokens are written as transformers 4.28 did."""
    from sentencepiece import sentencepiece_model_pb2

    def token(text: str) -> dict[str, Any]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": text, **flags}

    proto = sentencepiece_model_pb2.ModelProto.FromString((merged / "tokenizer.model").read_bytes())
    proto.pieces.add(piece="[PAD]", score=0.0)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": token("<s>"), "eos_token": token("</s>"),
                    "unk_token": token("<unk>"), "pad_token": None, "add_bos_token": True, "use_fast": False})
    )  # fmt: skip
    files = find_tokenizer(tmp_path)
    assert files.size == len(proto.pieces)
    assert files.special_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": files.size - 1}
    special = json.loads(files.texts["special_tokens_map.json"])
    assert special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"}
    found = loaded(tmp_path / "hf", dict(files.texts))
    assert found.encode("但[PAD]")[-1] == found.pad_token_id == files.size - 1


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x00garbage" * 40)
    with pytest.raises(CorruptFileError, match=r"tokenizer\.model is no SentencePiece model"):
        hugging_face_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="holds no tokenizer"):
        hugging_face_tokenizer(tmp_path)


# ---- Llama 3 ------------------------------------------------------------------------------------------------------

LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def words(text: str) -> list[bytes]:
    import regex

    return [word.encode() for word in regex.findall(LLAMA3_PATTERN, text)]


def trained_ranks(count: int) -> dict[bytes, int]:
    """Byte pair encoding of the example documents: the most frequent neighbours become a token, again and again."""
    examples = (ROOT / "examples" / name for name in ("handbook.md", "handbook.zh.md"))
    counts = Counter(word for file in examples for word in words(file.read_text(encoding="utf-8")))
    split = {word: [word[i : i + 1] for i in range(len(word))] for word in counts}
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < count:
        found: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                found[pair] += counts[word]
        (left, right), _ = max(found.items(), key=lambda entry: (entry[1], entry[0]))
        ranks.setdefault(left + right, len(ranks))
        split = {word: merge(parts, left + right) for word, parts in split.items()}
    return ranks


def merge(parts: list[bytes], token: bytes) -> list[bytes]:
    merged: list[bytes] = []
    for part in parts:
        if merged and merged[-1] + part == token:
            merged[-1] = token
        else:
            merged.append(part)
    return merged


def greedy(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule: a word that is a token is one; else join the neighbours of lowest rank, the leftmost first."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return trained_ranks(700)


@pytest.fixture
def llama3(tmp_path: Path, ranks: dict[bytes, int]) -> Path:
    """A `tokenizer.model` in Llama 3's form."""
    folder = tmp_path / "Llama-3"
    folder.mkdir()
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def test_a_llama_3_tokenizer_keeps_its_ids(llama3: Path, ranks: dict[bytes, int], tmp_path: Path) -> None:
    found = loaded(tmp_path / "hf", hugging_face_tokenizer(llama3))
    documents = [(ROOT / "examples" / name).read_text(encoding="utf-8") for name in ("handbook.md", "handbook.zh.md")]
    for text in [*TEXTS, *documents, "I'LL we're\r\n\r\n  12345 x"]:
        expected = [index for word in words(text) for index in greedy(word, ranks)]
        assert found.encode(text, add_special_tokens=False) == expected
        assert found.encode(text) == [700, *expected]
        assert found.decode(expected) == text


def test_llama_3_agrees_with_tiktoken_itself(llama3: Path, ranks: dict[bytes, int], tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    special = {token: 700 + place for place, token in enumerate(special_tokens(llama31=True))}
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    found = loaded(tmp_path / "hf", hugging_face_tokenizer(llama3))
    text = "<|start_header_id|>user<|end_header_id|>\n\n什么是望远镜？<|eot_id|><|python_tag|>"
    assert found.encode(text, add_special_tokens=False) == encoding.encode(text, allowed_special="all")


def test_llama_3_special_tokens_stand_where_meta_put_them() -> None:
    three, three_one = special_tokens(llama31=False), special_tokens(llama31=True)
    assert len(three) == len(three_one) == 256
    assert (three[0], three[1], three[6], three[9]) == (
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"
    )  # fmt: skip
    assert three[4] == "<|reserved_special_token_2|>"
    assert three[-1] == "<|reserved_special_token_250|>"
    assert (three_one[4], three_one[8], three_one[10]) == ("<|finetune_right_pad_id|>", "<|eom_id|>", "<|python_tag|>")
    assert three_one[5] == "<|reserved_special_token_2|>"
    assert three_one[-1] == "<|reserved_special_token_247|>"


def test_an_instruct_model_ends_turns_and_brings_its_template(llama3: Path, tmp_path: Path) -> None:
    base = find_tokenizer(llama3, llama31=False)
    instruct = find_tokenizer(llama3, llama31=True, instruct=True)
    assert base.size == instruct.size == 956
    assert base.special_ids == {"bos_token_id": 700, "eos_token_id": 701}
    assert instruct.special_ids == {"bos_token_id": 700, "eos_token_id": [701, 708, 709]}
    found = loaded(tmp_path / "hf", dict(instruct.texts))
    text = found.apply_chat_template([{"role": "user", "content": " hi "}], tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_llama_3_tokenizer_gets_its_model_back(llama3: Path, tmp_path: Path, smollm2: Path) -> None:
    loaded(
        tmp_path / "hf",
        {name: text for name, text in hugging_face_tokenizer(llama3).items() if name != "tokenizer.model"},
    )
    assert original_tokenizer(tmp_path / "hf")["tokenizer.model"] == (llama3 / "tokenizer.model").read_bytes()
    assert ranks_of(json.loads((smollm2 / "tokenizer.json").read_text())) is None  # GPT-2's kind
    assert "tokenizer.json" in original_tokenizer(smollm2)


@pytest.mark.parametrize("damage", ["cut", "rank", "base64", "double"])
def test_a_damaged_list_is_named_with_its_line(llama3: Path, damage: str) -> None:
    model = llama3 / "tokenizer.model"
    lines = model.read_bytes().splitlines()
    if damage == "cut":
        lines = lines[:100]
    elif damage == "rank":
        lines[300] = lines[300].split()[0] + b" 999"
    elif damage == "base64":
        lines[300] = b"*** 300"
    else:
        lines[300] = lines[299].split()[0] + b" 300"
    model.write_bytes(b"\n".join(lines))
    with pytest.raises(
        CorruptFileError, match="Line 301" if damage in {"rank", "base64"} else "does not hold every byte"
    ):
        hugging_face_tokenizer(llama3)
