"""Tokenizers: exact token ids for text, and text for ids as they arrive.

A model with a SentencePiece `tokenizer.model` is tokenised by SentencePiece itself: conversions to other tokenizer
libraries give other ids on vocabularies that were merged after training. Every other model uses the tokenizer that
transformers loads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from calpaca.core.errors import CorruptFileError, ModelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
CONTROL_FORM = re.compile(r"<[|｜].+[|｜]>")
"""How tokens that structure a conversation are written; some tokenizers, DeepSeek's for one, do not flag them."""


class Tokenizer(Protocol):
    """Text to ids and back. `special_tokens` maps `bos_token`, `eos_token` … to their texts; `control_tokens` are the
    texts of all tokens that steer the model instead of being text."""

    special_tokens: Mapping[str, str]
    control_tokens: frozenset[str]
    chat_template: str | None

    def __len__(self) -> int:
        """Number of tokens, added ones included: the largest id plus one."""
        ...

    def encode(self, text: str | tuple[str, ...], *, special_tokens: bool = False) -> list[int]:
        """Ids of `text`; texts of special tokens become their ids. `special_tokens` adds bos where the model has it.

        Several parts are one text, except that a special token whose text is cut by a border is ordinary text.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, special tokens left out. Bytes that form no character become U+FFFD."""
        ...

    def token_id(self, token: str) -> int | None: ...

    def for_grammar(self) -> Any:
        """What `llguidance.LLTokenizer` takes: a `tokenizers` JSON text, or an object with the bytes of each token."""
        ...


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a model or adapter folder. Raises ModelError when there is none or it is damaged."""
    pieces = folder / "tokenizer.model"
    if pieces.is_file() and not _is_tiktoken(pieces):
        return SentencePieceTokenizer(pieces, _read_json(folder / "tokenizer_config.json"), _added_tokens(folder))
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)}).", "Name a folder that does with --tokenizer."
        )
    return TransformersTokenizer(folder, trust_remote_code=trust_remote_code)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES[:2])


def _is_tiktoken(path: Path) -> bool:
    """Llama 3's `tokenizer.model` is a list of base64 ranks, not a SentencePiece protobuf."""
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/=]+ \d+\n", file.read(64)) is not None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is no valid JSON: {error}.", "Fetch the file again.") from error
    return content


def _added_tokens(folder: Path) -> dict[str, int]:
    """Tokens beyond the SentencePiece pieces, from either of the two files that record them."""
    added = {content: int(index) for content, index in _read_json(folder / "added_tokens.json").items()}
    decoder = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    added.update({token["content"]: int(index) for index, token in decoder.items()})
    return added


def stored_template(folder: Path) -> str | None:
    """The chat template that lies in a folder. Reads no vocabulary."""
    return _chat_template(folder, _read_json(folder / "tokenizer_config.json"))


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A `chat_template.jinja` beside the tokenizer, or the template in its configuration."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: the one called default
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


class SentencePieceTokenizer:
    """SentencePiece's own ids, plus added tokens, which are looked for in the text first."""

    def __init__(self, path: Path, config: Mapping[str, Any], added: Mapping[str, int]) -> None:
        import sentencepiece

        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise CorruptFileError(f"{path} is no SentencePiece model: {error}.", "Fetch the file again.") from error
        self.chat_template = _chat_template(path.parent, config)
        self._add_bos = bool(config.get("add_bos_token", True)) and self._pieces.bos_id() >= 0
        own = {
            "bos_token": self._pieces.bos_id(),
            "eos_token": self._pieces.eos_id(),
            "unk_token": self._pieces.unk_id(),
            "pad_token": self._pieces.pad_id(),
        }
        self.special_tokens: Mapping[str, str] = {
            name: _token_text(config.get(name)) or self._pieces.id_to_piece(index)
            for name, index in own.items()
            if index >= 0 or _token_text(config.get(name))
        }
        control = {self._pieces.id_to_piece(i): i for i in range(len(self._pieces)) if self._pieces.is_control(i)}
        self._added = {**control, **added}
        for text in self.special_tokens.values():
            if text not in self._added and self._pieces.id_to_piece(self._pieces.piece_to_id(text)) == text:
                self._added[text] = self._pieces.piece_to_id(text)
        self._special_ids = {self._added[text] for text in self.special_tokens.values() if text in self._added}
        self._special_ids |= set(control.values())
        self._texts = {index: text for text, index in self._added.items()}
        self.control_tokens = self._find_control_tokens(config)
        self._control_ids = {self.token_id(text) for text in self.control_tokens} - {self._pieces.unk_id()}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("|".join(re.escape(text) for text in longest_first)) if longest_first else None

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Texts that are looked for before SentencePiece is asked: control pieces, and tokens beside the pieces."""
        return self._added

    def _find_control_tokens(self, config: Mapping[str, Any]) -> frozenset[str]:
        """Added tokens, unless they are said to be ordinary, and pieces that users defined."""
        described = config.get("added_tokens_decoder", {}).values()
        ordinary = {token["content"] for token in described if not token.get("special", True)}
        pieces = map(self._pieces.id_to_piece, range(len(self._pieces)))
        return frozenset(self._added.keys() - ordinary | set(filter(CONTROL_FORM.fullmatch, (*self._added, *pieces))))

    def __len__(self) -> int:
        return max(len(self._pieces), *(index + 1 for index in self._added.values()), 0)

    def encode(self, text: str | tuple[str, ...], *, special_tokens: bool = False) -> list[int]:
        ids = [self._pieces.bos_id()] if special_tokens and self._add_bos else []
        run: list[str] = []  # what stands between two added tokens, perhaps in several parts
        for part in (text,) if isinstance(text, str) else text:
            position = 0
            for match in self._split.finditer(part) if self._split else ():
                ids += self._encode_run([*run, part[position : match.start()]])
                ids.append(self._added[match.group()])
                run, position = [], match.end()
            run.append(part[position:])
        return ids + self._encode_run(run)

    def _encode_run(self, run: list[str]) -> list[int]:
        """SentencePiece finds no control piece in a text, but it does find those that users defined: these are cut."""
        ids: list[int] = self._pieces.encode("".join(run))
        if len(run) > 1 and not self._control_ids.isdisjoint(ids):
            return [index for part in run for index in self._pieces.encode(part)]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for index in token_ids:
            if index not in self._texts and index < len(self._pieces):
                run.append(index)
                continue
            parts.append(self._pieces.decode(run))
            run = []
            parts.append("" if index in self._special_ids else self._texts.get(index, ""))
        parts.append(self._pieces.decode(run))
        return "".join(parts)

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        index = self._pieces.piece_to_id(token)
        return index if self._pieces.id_to_piece(index) == token else None

    def for_grammar(self) -> Any:
        return _PieceBytes(self._pieces, self._texts, self._special_ids, len(self), self.encode)


class _PieceBytes:
    """The bytes of every token, in the form llguidance's TokenizerWrapper asks for."""

    def __init__(self, pieces: Any, added: Mapping[int, str], special: set[int], size: int, encode: Any) -> None:
        self.eos_token_id: int = pieces.eos_id()
        self.bos_token_id: int | None = pieces.bos_id() if pieces.bos_id() >= 0 else None
        self.special_token_ids = sorted(special)
        self.tokens = [
            added[index].encode() if index in added else self._bytes(pieces, index) if index < len(pieces) else b""
            for index in range(size)
        ]
        self._encode = encode

    @staticmethod
    def _bytes(pieces: Any, index: int) -> bytes:
        piece: str = pieces.id_to_piece(index)
        if pieces.is_byte(index):
            return bytes([int(piece[3:5], 16)])  # <0xE4>
        return piece.replace("▁", " ").encode()

    def __call__(self, text: str) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("text, not bytes")  # llguidance probes for bytes support
        # What llguidance tokenises continues a text, so the space that SentencePiece puts before a text must go.
        ids: list[int] = self._encode(f"\n{text}")
        return ids[len(self._encode("\n")) :]


def _token_text(token: Any) -> str | None:
    """A token in a configuration is a text or an object with its text."""
    return token.get("content") if isinstance(token, Mapping) else token


class TransformersTokenizer:
    """The tokenizer that transformers loads from a folder."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        try:
            self.hf: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"The tokenizer in {folder} cannot be loaded: {error}.", "Fetch the files again."
            ) from error
        self.chat_template: str | None = self.hf.chat_template if isinstance(self.hf.chat_template, str) else None
        self.special_tokens: Mapping[str, str] = {
            name: text for name in SPECIAL_NAMES if (text := getattr(self.hf, name, None))
        }
        self.control_tokens = frozenset(
            token.content
            for token in self.hf.added_tokens_decoder.values()
            if token.special or CONTROL_FORM.fullmatch(token.content)
        )

    def __len__(self) -> int:
        return len(self.hf)

    def encode(self, text: str | tuple[str, ...], *, special_tokens: bool = False) -> list[int]:
        if isinstance(text, tuple):
            first = self.encode(text[0], special_tokens=special_tokens)
            return first + [index for part in text[1:] for index in self.encode(part)]
        ids: list[int] = self.hf.encode(text, add_special_tokens=special_tokens, verbose=False)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self.hf.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_id(self, token: str) -> int | None:
        find = self.hf.backend_tokenizer.token_to_id if self.hf.is_fast else self.hf.get_vocab().get
        index: int | None = find(token)
        return index

    def for_grammar(self) -> Any:
        if not self.hf.is_fast:
            raise ModelError(
                "Constrained output needs a tokenizer.json or a SentencePiece tokenizer.model.",
                "Name a folder that has one with --tokenizer.",
            )
        text: str = self.hf.backend_tokenizer.to_str()
        return text
