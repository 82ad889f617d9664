"""Llama 3's `tokenizer.model`, a list of byte strings and their ranks, and the same vocabulary as `tokenizer.json`.

The list (tiktoken's format) is base64 and rank on each line. It holds no special tokens and no pattern: both are in
Meta's code, and here. A pair of tokens is merged when their bytes are in the list, the lowest rank first.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from calpaca.core.errors import CorruptFileError

_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+")
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPECIAL_COUNT = 256
_BOS, _EOS, _END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
_NAMED = {
    "3": {0: _BOS, 1: _EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: _END_OF_TURN},
    "3.1": {
        0: _BOS, 1: _EOS, 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
        8: "<|eom_id|>", 9: _END_OF_TURN, 10: "<|python_tag|>",
    },
}  # fmt: skip
_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for m in messages -%}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Ranks:
    """Byte strings by rank, which is also their token id."""

    tokens: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        """The file's contents."""
        lines = (base64.b64encode(token) + b" " + str(rank).encode() for rank, token in enumerate(self.tokens))
        return b"\n".join(lines) + b"\n"

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Every way to make a token of two others, by rank."""
        known = {token: rank for rank, token in enumerate(self.tokens)}
        found: list[tuple[bytes, bytes]] = []
        for token in self.tokens:
            cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            found += sorted(
                (cut for cut in cuts if cut[0] in known and cut[1] in known),
                key=lambda cut: (known[cut[0]], known[cut[1]]),
            )
        return found


def special_tokens(llama31: bool) -> list[str]:
    """The 256 tokens after the list, in order: named ones, and reserved ones that are numbered between them."""
    named = _NAMED["3.1" if llama31 else "3"]
    reserved = iter(range(_SPECIAL_COUNT))
    return [named.get(place) or f"<|reserved_special_token_{next(reserved)}|>" for place in range(_SPECIAL_COUNT)]


def is_ranks(model: Path) -> bool:
    """Whether a `tokenizer.model` is such a list rather than a SentencePiece model."""
    with model.open("rb") as file:
        return _LINE.match(file.read(256)) is not None


def read_ranks(model: Path) -> Ranks:
    """Read a list. Raises CorruptFileError when it is damaged or ends early."""
    tokens = []
    for number, line in enumerate(model.read_bytes().splitlines()):
        try:
            token, _, rank = line.partition(b" ")
            if int(rank) != number:
                raise ValueError(f"rank {int(rank)} where {number} should stand")
            tokens.append(base64.b64decode(token, validate=True))
        except (ValueError, binascii.Error) as error:
            raise CorruptFileError(
                f"Line {number + 1} of {model} is no token and rank: {error}.", "Fetch the file again."
            ) from error
    if len({token for token in tokens if len(token) == 1}) != 256 or len(set(tokens)) != len(tokens):
        raise CorruptFileError(f"{model} does not hold every byte, or a token twice.", "Fetch the file again.")
    return Ranks(tuple(tokens))


def hugging_face_files(
    ranks: Ranks, model: Path, *, llama31: bool, instruct: bool
) -> tuple[dict[str, bytes], dict[str, int | list[int]]]:
    """The files of a Hugging Face tokenizer, by name, and the ids of bos and eos."""
    special = special_tokens(llama31)
    eos = _END_OF_TURN if instruct else _EOS
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if llama31:
        config["pad_token"] = "<|finetune_right_pad_id|>"  # noqa: S105  # a token's text
    if instruct:
        config["chat_template"] = _TEMPLATE
    texts = {
        "tokenizer.json": _fast(ranks, special).encode(),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json({key: config[key] for key in config if key.endswith("_token")}),
        "tokenizer.model": model.read_bytes(),
    }
    first = len(ranks.tokens)
    ends = [_EOS, *(["<|eom_id|>"] if llama31 else []), _END_OF_TURN] if instruct else [_EOS]
    ids = [first + special.index(token) for token in ends]
    return texts, {"bos_token_id": first, "eos_token_id": ids if instruct else ids[0]}


def _fast(ranks: Ranks, special: list[str]) -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    vocabulary = {_letters(token): rank for rank, token in enumerate(ranks.tokens)}
    merges = [(_letters(left), _letters(right)) for left, right in ranks.merges()]
    tokenizer = Tokenizer(BPE(vocabulary, merges, fuse_unk=False, byte_fallback=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    bos = [(_BOS, len(ranks.tokens))]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{_BOS} $A", pair=f"{_BOS} $A {_BOS} $B", special_tokens=bos),
        ]
    )
    text: str = tokenizer.to_str()
    return text


def ranks_of(content: Mapping[str, Any]) -> Ranks | None:
    """The list that a `tokenizer.json` was made from; None when it is no Llama 3 tokenizer.

    It is one when the list gives the same merges and the pattern is Llama 3's.
    """
    model = content.get("model", {})
    if model.get("type") != "BPE" or PATTERN not in json.dumps(
        content.get("pre_tokenizer"), ensure_ascii=False
    ).replace("\\\\", "\\"):
        return None
    by_id = sorted(model["vocab"].items(), key=lambda entry: int(entry[1]))
    if [index for _, index in by_id] != list(range(len(by_id))):
        return None
    try:
        ranks = Ranks(tuple(bytes(_bytes()[letter] for letter in text) for text, _ in by_id))
    except KeyError:
        return None
    told = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    made = [(_letters(left), _letters(right)) for left, right in ranks.merges()]
    return ranks if told == made else None


@cache
def _characters() -> list[str]:
    """A printable character for each byte, as GPT-2 chose them: itself, or one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in set(printable) else next(others)) for byte in range(256)]


@cache
def _bytes() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(_characters())}


def _letters(token: bytes) -> str:
    return "".join(_characters()[byte] for byte in token)


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
