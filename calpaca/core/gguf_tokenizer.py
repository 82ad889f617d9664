"""The tokenizer that a GGUF file describes, as files of a Hugging Face folder that give the ids that llama.cpp gives.

transformers reads such tokenizers too, but by rules of its own: it ignores scores that several pieces share, and how
texts are cut before BPE.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calpaca.core.errors import MissingExtraError, UnsupportedError
from calpaca.core.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens. SentencePiece has the same numbers."""

_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_BPE = 2  # SentencePiece's model type
_BYTES = 256


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """Files by name: `tokenizer.model` or `tokenizer.json`, settings, and the chat template.

    Raises UnsupportedError for a tokenizer that is neither SentencePiece's BPE nor byte-level BPE with known cutting.
    """
    told = _read(path)
    kind = told.get("tokenizer.ggml.model")
    if kind not in {"llama", "gpt2"}:
        raise UnsupportedError(f"{path.name} has a tokenizer of kind {kind}.", "Name another one with --tokenizer.")
    files = {"tokenizer_config.json": _json(_config(told))}
    files |= _pieces(told) if kind == "llama" else _merges(told, path)
    if "tokenizer.chat_template" in told:
        files["chat_template.jinja"] = str(told["tokenizer.chat_template"]).encode()
    return files


def hugging_face_files(path: Path, context_length: int) -> dict[str, bytes]:
    """The same in a form that transformers reads with the same ids.

    Raises UnsupportedError as `tokenizer_files` does, ModelError for pieces that have no such form.
    """
    files = tokenizer_files(path)
    if "tokenizer.model" not in files:
        config = json.loads(files["tokenizer_config.json"])
        return files | {"tokenizer_config.json": _json(config | {"model_max_length": context_length})}
    from calpaca.core.convert.llama_tokenizer import sentencepiece_files

    settings = json.loads(files.pop("tokenizer_config.json")) | {"model_max_length": context_length}
    with TemporaryDirectory() as name:
        model = Path(name) / "tokenizer.model"
        model.write_bytes(files["tokenizer.model"])
        return files | sentencepiece_files(model, settings, {})[0]


def _read(path: Path) -> dict[str, Any]:
    """Every `tokenizer.` key of a file."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise MissingExtraError("A GGUF file", "torch", error.name or "gguf") from error
    fields = GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


def _config(told: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`."""
    tokens = told["tokenizer.ggml.tokens"]
    ids = {text: told.get(f"tokenizer.ggml.{name}_token_id") for name, text in _SPECIAL.items()}
    special = {name: tokens[index] for name, index in ids.items() if index is not None and index < len(tokens)}
    add_bos = told.get("tokenizer.ggml.add_bos_token", told["tokenizer.ggml.model"] == "llama")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(add_bos) and "bos_token" in special,
        "add_eos_token": bool(told.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in special,
        "clean_up_tokenization_spaces": False,
        **special,
        "added_tokens_decoder": {str(token.pop("id")): token for token in _added(told)},
    }


def _added(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens that are looked for in a text before anything else, as `tokenizer.json` lists them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": token, **flags, "special": kind != USER_DEFINED}
        for index, (token, kind) in enumerate(_tokens(told))
        if kind in {UNKNOWN, CONTROL, USER_DEFINED}
    ]


def _tokens(told: Mapping[str, Any]) -> list[tuple[str, int]]:
    tokens: Sequence[str] = told["tokenizer.ggml.tokens"]
    types = told.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    return list(zip(tokens, types, strict=True))


# ---- SentencePiece ------------------------------------------------------------------------------------------------


def _pieces(told: Mapping[str, Any]) -> dict[str, bytes]:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    tokens = _tokens(told)
    for (token, kind), score in zip(tokens, told["tokenizer.ggml.scores"], strict=True):
        text = token.replace(" ", "▁") if kind == USER_DEFINED else token
        proto.pieces.add(piece=text, score=score, type=kind)
    trainer_spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer_spec.model_type = _BPE
    trainer_spec.vocab_size = len(tokens)
    trainer_spec.byte_fallback = sum(kind == BYTE for _, kind in tokens) == _BYTES
    for name, field in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = told.get(f"tokenizer.ggml.{name}_token_id")
        setattr(trainer_spec, f"{field}_id", -1 if index is None else index)
        if index is not None and field != "unk":
            setattr(trainer_spec, f"{field}_piece", tokens[index][0])
    unknown = next((index for index, (_, kind) in enumerate(tokens) if kind == UNKNOWN), 0)
    trainer_spec.unk_id, trainer_spec.unk_piece = unknown, tokens[unknown][0]
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(told.get("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = False
    return {"tokenizer.model": proto.SerializeToString()}


# ---- byte-level BPE -----------------------------------------------------------------------------------------------


def _merges(told: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    cutting = PRE_TOKENIZERS.get(str(told.get("tokenizer.ggml.pre")))
    if cutting is None:
        raise UnsupportedError(
            f"{path.name} cuts texts as '{told.get('tokenizer.ggml.pre')}', which is not known here.",
            "Name the tokenizer of its Hugging Face folder with --tokenizer.",
        )
    content = {
        "version": "1.0",
        "added_tokens": _added(told),
        "normalizer": None,
        "pre_tokenizer": cutting.to_json(),
        "post_processor": _ends(told),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _model(told, cutting),
    }
    return {"tokenizer.json": _json(content)}


def _model(told: Mapping[str, Any], cutting: PreTokenizer) -> dict[str, Any]:
    return {
        "type": "BPE",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": cutting.ignore_merges,
        "vocab": {token: index for index, (token, kind) in enumerate(_tokens(told)) if kind != UNUSED},
        "merges": [merge.split(" ", 1) for merge in told.get("tokenizer.ggml.merges", ())],
    }


def _ends(told: Mapping[str, Any]) -> dict[str, Any] | None:
    """What puts bos and eos around a text."""
    config = _config(told)
    names = [name for name in ("bos", "eos") if config[f"add_{name}_token"]]
    if not names:
        return None
    special = {config[f"{name}_token"]: told[f"tokenizer.ggml.{name}_token_id"] for name in names}
    parts: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    second: list[dict[str, Any]] = [{"Sequence": {"id": "B", "type_id": 0}}]
    for name in names:
        part = {"SpecialToken": {"id": config[f"{name}_token"], "type_id": 0}}
        parts, second = ([part, *parts], [part, *second]) if name == "bos" else ([*parts, part], [*second, part])
    tokens = {text: {"id": text, "ids": [index], "tokens": [text]} for text, index in special.items()}
    return {"type": "TemplateProcessing", "single": parts, "pair": [*parts, *second], "special_tokens": tokens}


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"
