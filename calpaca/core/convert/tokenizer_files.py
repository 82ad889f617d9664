"""The tokenizer's files of a model in either form: Hugging Face's, or the one `tokenizer.model` of original LLaMA.

Token ids are the same before and after, on every text that was tried: what is written is loaded with transformers and
compared with the source before anything is given out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calpaca.core.convert.json_file import read_object
from calpaca.core.convert.llama3_tokenizer import Ranks, hugging_face_files, is_ranks, ranks_of, read_ranks
from calpaca.core.convert.llama_tokenizer import sentencepiece_files
from calpaca.core.errors import ModelNotFoundError
from calpaca.core.tokenizer import Tokenizer, load_tokenizer

MODEL_FILE = "tokenizer.model"
HF_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class TokenizerFiles:
    """`texts` are files by name, `size` counts tokens; `special_ids` are `bos_token_id` … as `config.json` has them."""

    texts: Mapping[str, bytes]
    size: int
    special_ids: Mapping[str, int | list[int]] = field(default_factory=dict)


def hugging_face_tokenizer(source: Path) -> dict[str, bytes]:
    """The files, by name, that give a Hugging Face folder the tokenizer of `source`: a folder or a `tokenizer.model`.

    A SentencePiece model gets a `tokenizer.json` only where that gives the same ids; a vocabulary that was merged after
    training does not, and is then read by transformers' SentencePiece class. A tokenizer without `tokenizer.model` is
    taken as it is. Raises ModelNotFoundError or CorruptFileError.
    """
    return dict(find_tokenizer(source).texts)


def find_tokenizer(source: Path, *, llama31: bool = True, instruct: bool = False) -> TokenizerFiles:
    """`hugging_face_tokenizer`, with sizes and ids. Llama 3's file names no special tokens: `llama31` chooses those of
    Llama 3.1 and later, `instruct` those that end an answer and the chat template."""
    model = source / MODEL_FILE if source.is_dir() else source
    folder = source if source.is_dir() else None
    if model.is_file() and not is_ranks(model):
        return _of_sentencepiece(model, folder)
    if folder is not None and (folder / "tokenizer.json").is_file():
        return _as_it_is(folder)
    if not model.is_file():
        raise ModelNotFoundError(
            f"{source} holds no tokenizer (tokenizer.model, tokenizer.json).", "Name one with --tokenizer."
        )
    return _of_ranks(read_ranks(model), model, llama31, instruct)


def _of_sentencepiece(model: Path, folder: Path | None) -> TokenizerFiles:
    settings = _read_json(folder / "tokenizer_config.json") if folder else {}
    added = _read_json(folder / "added_tokens.json") if folder else {}
    texts, tokenizer = sentencepiece_files(model, settings, added)
    template = folder / "chat_template.jinja" if folder else None
    if template is not None and template.is_file():
        texts["chat_template.jinja"] = template.read_bytes()
    return TokenizerFiles(texts, len(tokenizer), _special_ids(tokenizer))


def _of_ranks(ranks: Ranks, model: Path, llama31: bool, instruct: bool) -> TokenizerFiles:
    texts, special_ids = hugging_face_files(ranks, model, llama31=llama31, instruct=instruct)
    return TokenizerFiles(texts, json.loads(texts["tokenizer.json"])["added_tokens"][-1]["id"] + 1, special_ids)


def _as_it_is(folder: Path) -> TokenizerFiles:
    """Files of a tokenizer that has no SentencePiece model: they are what transformers reads."""
    tokenizer = load_tokenizer(folder)
    return TokenizerFiles(_beside(folder), len(tokenizer), _special_ids(tokenizer))


def original_tokenizer(folder: Path) -> dict[str, bytes]:
    """The files that go beside `.pth` parts: `tokenizer.model`, and settings that it does not hold.

    A Llama 3 tokenizer gets its `tokenizer.model` back from `tokenizer.json`. One that has no such form keeps the files
    that it has.
    """
    texts = _beside(folder)
    if MODEL_FILE in texts:
        if not is_ranks(folder / MODEL_FILE):
            texts.pop("tokenizer.json", None)  # made anew from the pieces where that is exact
    elif "tokenizer.json" in texts and (ranks := ranks_of(json.loads(texts["tokenizer.json"]))) is not None:
        texts[MODEL_FILE] = ranks.to_bytes()
    return texts


def _beside(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in a folder, as they are."""
    return {name: (folder / name).read_bytes() for name in (*HF_FILES, MODEL_FILE) if (folder / name).is_file()}


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    ids = {f"{name}_id": tokenizer.token_id(text) for name, text in tokenizer.special_tokens.items()}
    return {name: index for name, index in ids.items() if index is not None and name != "unk_token_id"}


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file) if file.is_file() else {}


def template_digest(texts: Mapping[str, bytes | Path]) -> str | None:
    """sha256 of the chat template among a model's small files, by name; None where there is none."""
    template: Any = texts.get("chat_template.jinja")
    if template is None and "tokenizer_config.json" in texts:
        template = json.loads(_content(texts["tokenizer_config.json"])).get("chat_template")
    if template is None:
        return None
    named = not isinstance(template, str | bytes | Path)  # a list of several templates
    data = (
        json.dumps(template).encode()
        if named
        else template.encode()
        if isinstance(template, str)
        else _content(template)
    )
    return hashlib.sha256(data).hexdigest()


def _content(text: bytes | Path) -> bytes:
    return text if isinstance(text, bytes) else text.read_bytes()
