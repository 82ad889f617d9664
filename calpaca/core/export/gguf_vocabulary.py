"""The vocabulary of a GGUF file, from a tokenizer of either kind, with the ids that the tokenizer gives.

`llama` is SentencePiece's: pieces, their scores and types. `gpt2` is byte-level BPE: tokens, merges, and the name of the
way in which texts are cut before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from calpaca.core.errors import ModelError, UnsupportedError
from calpaca.core.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from calpaca.core.pre_tokenizers import PRE_TOKENIZERS, find_pre_tokenizer
from calpaca.core.tokenizer import CONTROL_FORM, SentencePieceTokenizer, Tokenizer
from calpaca.core.weights import check_vocabulary

_BPE = 2  # SentencePiece's model type
_ADDED_SCORE = -1000.0
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unk": "unk_token", "pad": "pad_token"}


@dataclass(frozen=True)
class Vocabulary:
    """`tokens`, `types` and `scores` by id. `scores` are SentencePiece's, `merges` (`left right`) those of BPE.

    `special_ids` has `bos`, `eos`, `unk` and `pad` where the tokenizer has them. `composes`: the tokenizer joins letters
    and accents first (NFC), which llama.cpp does not. `notes` are for a person.
    """

    model: Literal["llama", "gpt2"]
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    pre: str = "default"
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    special_ids: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    composes: bool = False
    notes: tuple[str, ...] = ()


def read_vocabulary(folder: Path, tokenizer: Tokenizer, rows: int, pre: str | None = None) -> Vocabulary:
    """The vocabulary of `tokenizer`, loaded from `folder`, filled up to `rows` embedding rows.

    `pre` names the pre-tokenizer where it is not known. Raises UnsupportedError for a tokenizer that llama.cpp does not
    have, ModelError when the model has too few rows.
    """
    check_vocabulary(len(tokenizer), rows)
    if isinstance(tokenizer, SentencePieceTokenizer):
        found = _of_sentencepiece(folder / "tokenizer.model", tokenizer)
    else:
        found = _of_json(_content(tokenizer), pre)
    return _filled(_with_ends(found, tokenizer), rows)


def _content(tokenizer: Any) -> dict[str, Any]:
    if not tokenizer.hf.is_fast:
        raise UnsupportedError(
            f"A {type(tokenizer.hf).__name__} cannot be exported to GGUF.",
            "The model needs a tokenizer.json, or a SentencePiece tokenizer.model.",
        )
    content: dict[str, Any] = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    if content["model"]["type"] != "BPE":
        raise UnsupportedError(
            f"A {content['model']['type']} tokenizer cannot be exported to GGUF for this architecture.",
            "Supported are byte-level BPE and SentencePiece's BPE.",
        )
    return content


# ---- SentencePiece ------------------------------------------------------------------------------------------------


def _of_sentencepiece(model: Path, tokenizer: SentencePieceTokenizer) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    if proto.trainer_spec.model_type != _BPE:
        raise UnsupportedError(
            f"{model} is no BPE model; llama.cpp has only those for this architecture.",
            "Export a model with the tokenizer that LLaMA was trained with.",
        )
    count = len(proto.pieces)
    tokens = [piece.piece for piece in proto.pieces] + [""] * (len(tokenizer) - count)
    scores = [piece.score for piece in proto.pieces] + [_ADDED_SCORE] * (len(tokenizer) - count)
    types = [piece.type for piece in proto.pieces] + [UNUSED] * (len(tokenizer) - count)
    for text, index in tokenizer.added_tokens.items():
        tokens[index] = text
        if types[index] != UNKNOWN:
            types[index] = CONTROL if text in tokenizer.control_tokens else USER_DEFINED
    return Vocabulary(
        "llama",
        tuple(map(_as_written, tokens, types)),
        tuple(types),
        scores=tuple(scores),
        add_space_prefix=proto.normalizer_spec.add_dummy_prefix,
    )


def _as_written(token: str, kind: int) -> str:
    """llama.cpp looks for tokens that users defined in the text itself, where a space is a space."""
    return token.replace("▁", " ") if kind == USER_DEFINED else token


# ---- tokenizer.json -----------------------------------------------------------------------------------------------


def _of_json(content: Mapping[str, Any], pre: str | None) -> Vocabulary:
    model = content["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    vocabulary: dict[str, int] = model["vocab"]
    added = {int(token["id"]): token for token in content.get("added_tokens", ())}
    size = 1 + max([*vocabulary.values(), *added])
    tokens, types = [""] * size, [UNUSED] * size
    for text, index in vocabulary.items():
        tokens[index], types[index] = text, NORMAL
    if model.get("byte_fallback"):
        found = _with_scores(tokens, types, merges, content)
    else:
        found = _with_merges(tokens, types, merges, content, pre)
    tokens, types = list(found.tokens), list(found.types)
    for index, token in added.items():
        kind = CONTROL if token["special"] or _looks_special(token["content"]) else USER_DEFINED
        types[index] = UNKNOWN if types[index] == UNKNOWN else kind
        tokens[index] = _as_written(token["content"], kind)
    return replace(found, tokens=tuple(tokens), types=tuple(types))


def _looks_special(text: str) -> bool:
    return CONTROL_FORM.fullmatch(text) is not None


def _with_merges(
    tokens: list[str], types: list[int], merges: list[str], content: Mapping[str, Any], pre: str | None
) -> Vocabulary:
    normalizer = (content.get("normalizer") or {}).get("type")
    if normalizer not in {None, "NFC"}:
        raise UnsupportedError(
            f"The tokenizer changes texts before it cuts them ({normalizer}), which llama.cpp does not.",
            "It cannot be exported to GGUF with the same token ids.",
        )
    notes = (
        ["llama.cpp does not compose letters and accents (NFC): decomposed texts get other ids."] if normalizer else []
    )
    found = find_pre_tokenizer(content)
    if pre is None and found is None:
        raise UnsupportedError(
            "The tokenizer cuts texts in a way that no name is known for.",
            f"Name llama.cpp's pre-tokenizer with --pre, for example one of {', '.join(PRE_TOKENIZERS)}.",
        )
    name = pre or (found.name if found else "")
    if name not in PRE_TOKENIZERS:
        notes.append(f"Pre-tokenizer '{name}' is not known here: token ids were not compared.")
    return Vocabulary(
        "gpt2", tuple(tokens), tuple(types), name,
        merges=tuple(merges), composes=normalizer is not None, notes=tuple(notes),
    )  # fmt: skip


def _with_scores(tokens: list[str], types: list[int], merges: list[str], content: Mapping[str, Any]) -> Vocabulary:
    """SentencePiece's vocabulary without its `tokenizer.model`: a piece scores by the first merge that makes it."""
    scores = dict[str, float]()
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        scores.setdefault(left + right, -float(rank))
    unknown = content["model"].get("unk_token")
    for index, token in enumerate(tokens):
        if _BYTE.fullmatch(token):
            types[index] = BYTE
        elif token == unknown:
            types[index] = UNKNOWN
    return Vocabulary(
        "llama",
        tuple(tokens),
        tuple(types),
        scores=tuple(scores.get(token, -float(len(merges))) for token in tokens),
        add_space_prefix=_prepends(content),
    )


def _prepends(content: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normalizer, cutter = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    if any(each["type"] == "Prepend" for each in normalizer.get("normalizers", [normalizer] if normalizer else [])):
        return True
    return cutter.get("type") == "Metaspace" and cutter.get("prepend_scheme", "always") != "never"


# ---- both ---------------------------------------------------------------------------------------------------------


def _with_ends(found: Vocabulary, tokenizer: Tokenizer) -> Vocabulary:
    """With the ids of special tokens, and whether the tokenizer puts them around a text."""
    ids = {name: tokenizer.token_id(tokenizer.special_tokens.get(key, "")) for name, key in _SPECIAL.items()}
    special = {name: index for name, index in ids.items() if index is not None}
    plain, ended = tokenizer.encode("a"), tokenizer.encode("a", special_tokens=True)
    return replace(
        found,
        special_ids=special,
        add_bos=len(ended) > len(plain) and ended[0] == special.get("bos"),
        add_eos=len(ended) > len(plain) and ended[-1] == special.get("eos"),
    )


def _filled(found: Vocabulary, rows: int) -> Vocabulary:
    """With a name for every embedding row: ids without a token get `[PAD<id>]`, of which none is ever found in a text."""
    taken = set(found.tokens)
    tokens = [*found.tokens, *[""] * (rows - len(found.tokens))]
    types = [*found.types, *[UNUSED] * (rows - len(found.types))]
    for index, kind in enumerate(types):
        if kind == UNUSED and not tokens[index]:
            tokens[index] = next(name for name in (f"[PAD{index}]", f"[PAD{index}]#") if name not in taken)
    if len(set(tokens)) != len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise ModelError(
            f"The vocabulary has two tokens {twice!r}, which llama.cpp does not load.", "Rename or remove one of them."
        )
    scores = (*found.scores, *[_ADDED_SCORE] * (rows - len(found.scores))) if found.scores else ()
    return replace(found, tokens=tuple(tokens), types=tuple(types), scores=scores)
