"""A SentencePiece `tokenizer.model` as Hugging Face files that give the same ids.

`tokenizer.json` knows the order of merges, but no ties: SentencePiece merges pieces of equal score from the left.
A trained vocabulary has one score for each piece and fits. In a vocabulary that was merged afterwards, as
Chinese-LLaMA's, thousands of pieces share a score, and no `tokenizer.json` gives the same ids: there transformers is
told to use its SentencePiece class.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calpaca.core.errors import CorruptFileError, MissingExtraError, ModelError
from calpaca.core.tokenizer import SPECIAL_NAMES, Tokenizer, load_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _BY_USERS = 1, 2, 3, 4  # types of pieces in sentencepiece_model.proto
_BPE = 2  # trainer_spec.model_type
_PAD_PIECES = ("[PAD]", "<pad>")
_PROBES, _PIECES_OF_A_PROBE = 1000, 30
_NOT_KEPT = {"auto_map", "tokenizer_file", "vocab_file", "special_tokens_pattern", "backend"}
_FAST, _SLOW = "PreTrainedTokenizerFast", "SentencePieceBackend"
# Chosen by hand: spaces in odd places, digits, characters without a piece, control tokens in a text.
_TEXTS = (
    "", " ", "  two  spaces ", "line\n\nline\r\n\ttab", "1234567890 3.14159", "你好，世界！ 您好", "🧪 𠮷 ﷺ e\u0301", "▁x ▁▁",
    "x\u3000y\u00a0z\u200b", "<s>hi</s> you</s>ok", "hi </s> you", "{\"a\": [1, 2]}", "naïve façade — “q”", "a" * 50, "한국어 日本語",
)  # fmt: skip


def sentencepiece_files(
    model: Path, settings: Mapping[str, Any], added: Mapping[str, int]
) -> tuple[dict[str, bytes], Tokenizer]:
    """Hugging Face files for a SentencePiece model, and its tokenizer.

    `settings` are those of an earlier `tokenizer_config.json` and `added` of an `added_tokens.json`, both empty for an
    original checkpoint. Raises CorruptFileError for a damaged model, ModelError when no form gives the same ids.
    """
    proto = _read_model(model)
    texts = {"tokenizer.model": model.read_bytes()}
    decoder = _added_tokens(proto, settings, added)
    config = _config(proto, settings, decoder)
    special = {name: _token_text(config[name]) for name in SPECIAL_NAMES if config.get(name)}
    texts["special_tokens_map.json"] = _json(special)
    forms = [{"tokenizer_config.json": _json(config | _slow(config))}]
    if (fast := _fast(proto, config, decoder)) is not None:
        fast_config = _json(config | {"tokenizer_class": _FAST})
        forms.insert(0, {"tokenizer.json": fast.encode(), "tokenizer_config.json": fast_config})
    different = ""
    for form in forms:
        tokenizer, different = _loaded(texts | form, proto)
        if not different:
            return texts | form, tokenizer
    raise ModelError(
        f"transformers gives other token ids than {model}, for example for {different[:60]!r}.",
        "The vocabulary cannot be written as Hugging Face files; keep the model in the form that it has.",
    )


def _loaded(texts: Mapping[str, bytes], proto: Any) -> tuple[Tokenizer, str]:
    """The tokenizer that files make up, and a text for which transformers gives other ids; empty when there is none."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        for file, content in texts.items():
            (folder / file).write_bytes(content)
        tokenizer = load_tokenizer(folder)
        return tokenizer, next(_differences(folder, tokenizer, proto), "")


def _read_model(model: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ModuleNotFoundError as error:
        raise MissingExtraError("A SentencePiece tokenizer", "torch", error.name or "sentencepiece") from error
    try:
        SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise CorruptFileError(f"{model} is no SentencePiece model: {error}.", "Fetch the file again.") from error
    return sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())


def _added_tokens(proto: Any, settings: Mapping[str, Any], added: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Tokens beside the pieces and control pieces, by id, as `tokenizer_config.json` lists them."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    control = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type in {_UNKNOWN, _CONTROL}}
    decoder = {str(index): {"content": text, **flags} for text, index in {**control, **added}.items()}
    decoder |= {str(index): dict(token) for index, token in settings.get("added_tokens_decoder", {}).items()}
    return dict(sorted(decoder.items(), key=lambda entry: int(entry[0])))


def _config(proto: Any, settings: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` but for the class: LLaMA's settings under those of the source.

    A pad token is looked for among the pieces where the settings have none: Chinese-LLaMA-Alpaca's say null beside
    a vocabulary that has one.
    """
    trainer_spec, pieces = proto.trainer_spec, [piece.piece for piece in proto.pieces]
    ids = {"bos_token": trainer_spec.bos_id, "eos_token": trainer_spec.eos_id, "unk_token": trainer_spec.unk_id}
    special: dict[str, Any] = {name: pieces[index] for name, index in ids.items() if 0 <= index < len(pieces)}
    pad = next((pad for pad in _PAD_PIECES if pad in set(pieces)), None)
    special |= {"pad_token": pad} if pad else {}
    kept = {key: value for key, value in settings.items() if key not in _NOT_KEPT and value is not None}
    config = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, **special, **kept}
    return config | {"added_tokens_decoder": decoder, "legacy": True}  # legacy: what SentencePiece itself does


def _slow(config: Mapping[str, Any]) -> dict[str, Any]:
    ends = [name for name in ("bos", "eos") if config.get(f"add_{name}_token")]
    return {"tokenizer_class": _SLOW, "special_tokens_pattern": "_".join(ends) or "none"}


def _fast(proto: Any, config: Mapping[str, Any], decoder: Mapping[str, dict[str, Any]]) -> str | None:
    """`tokenizer.json` with the merges of the pieces by score; None for a kind of model that it cannot express."""
    normalizer, trainer_spec = proto.normalizer_spec, proto.trainer_spec
    plain = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    if (
        trainer_spec.model_type != _BPE
        or not plain
        or not normalizer.add_dummy_prefix
        or not trainer_spec.byte_fallback
    ):
        return None
    from tokenizers import AddedToken, decoders, normalizers, processors
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import BPE

    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    unknown = proto.pieces[trainer_spec.unk_id].piece
    tokenizer = FastTokenizer(BPE(vocabulary, _merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for token in decoder.values():
        tokenizer.add_tokens([AddedToken(**token)])
    bos, eos = (
        _token_text(config.get(f"{end}_token")) if config.get(f"add_{end}_token") else None for end in ("bos", "eos")
    )
    single = " ".join(filter(None, (bos, "$A", eos)))
    ends = [(text, vocabulary[text]) for text in (bos, eos) if text]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} {single.replace('$A', '$B')}", special_tokens=ends
    )
    text: str = tokenizer.to_str()
    return text


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the best score first."""
    normal = [piece for piece in proto.pieces if piece.type == _NORMAL]
    known = {piece.piece for piece in normal}
    return [
        (text[:cut], text[cut:])
        for text in (piece.piece for piece in sorted(normal, key=lambda piece: -piece.score))
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]


def _differences(folder: Path, tokenizer: Tokenizer, proto: Any) -> Iterator[str]:
    """Probe texts for which transformers gives other ids than SentencePiece."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    yield from (
        text
        for text in (*_TEXTS, *_probes(proto))
        if loaded.encode(text, verbose=False) != tokenizer.encode(text, special_tokens=True)
    )


def _probes(proto: Any) -> Iterator[str]:
    """Texts of random pieces, half of them from pieces that share their score with others, which is where ids differ;
    and texts with each piece that users defined."""
    normal = [piece for piece in proto.pieces if piece.type == _NORMAL]
    counts = Counter(piece.score for piece in normal)
    tied = [piece for piece in normal if counts[piece.score] > 1]
    chance = random.Random(0)  # noqa: S311  # no secret
    for number in range(_PROBES):
        pieces = chance.choices(tied if tied and number % 2 else normal, k=_PIECES_OF_A_PROBE)
        yield "".join(piece.piece for piece in pieces).replace("▁", " ")
    yield from (f"a{piece.piece}b {piece.piece} c" for piece in proto.pieces if piece.type == _BY_USERS)


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
