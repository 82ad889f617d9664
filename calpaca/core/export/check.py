"""A GGUF file is read back and compared with what it was made from, before it is given its name."""

from __future__ import annotations

import gc
import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from calpaca.core.checkpoint.dtypes import to_torch
from calpaca.core.checkpoint.plan import PlannedTensor
from calpaca.core.compare.comparison import PROMPTS, TOLERANCES
from calpaca.core.errors import ModelError
from calpaca.core.export.gguf_tensors import GgufTensor
from calpaca.core.export.gguf_types import PlainType, Rows, gguf
from calpaca.core.export.gguf_vocabulary import Vocabulary
from calpaca.core.export.source import Source
from calpaca.core.files import ModelFiles
from calpaca.core.gguf import without_bars
from calpaca.core.gguf_model import load_model
from calpaca.core.gguf_tokenizer import CONTROL, NORMAL, USER_DEFINED, tokenizer_files
from calpaca.core.golden import render_golden
from calpaca.core.pre_tokenizers import PRE_TOKENIZERS
from calpaca.core.template import ChatTemplate, choose_template
from calpaca.core.tokenizer import Tokenizer, load_tokenizer
from calpaca.core.weights import free_memory, quiet_transformers

if TYPE_CHECKING:
    from torch import Tensor

_PROBES, _TOKENS_OF_A_PROBE = 300, 30
_MOST_TOKENS = 64  # of a prompt whose logits are compared
_COPIES = 3  # of the weights in float32, while transformers reads a GGUF file
_TINY = 2.0**-17  # a scale below float16's smallest step moves a number by no more than this
TEXTS = (
    "", " ", "  two  spaces ", "line\n\nline\r\n\ttab\n", "1234567890 3.14159 2016年02月29日", "你好，世界！ 您好　全角",
    "羊驼是一种生活在南美洲的动物。", "🦙🏔️ 👩‍👩‍👧‍👦 𠮷 ﷺ", "naïve façade — “q”…", "def f(x):\n    return {'a': x<=1}  # ok\n\n\n",
    "HTTPServer2 it's WE'LL they'd", "a" * 50, "한국어 日本語 русский عربى", "<b>&amp;</b> {{x}} [INST] <<SYS>>", "\t\t x\u00a0y\u200bz",
)  # fmt: skip


@dataclass(frozen=True)
class ExportCheck:
    """What was compared. `tensors` counts those read back, `texts` those with equal ids (None: cannot be told).

    `relative` is the largest logit difference in parts of the largest logit and `agreement` the share of positions with
    the same likeliest token, both None where the logits were not compared; then `reason` says why.
    """

    tensors: int
    texts: int | None
    relative: float | None = None
    agreement: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        ids = "token ids were not compared" if self.texts is None else f"equal token ids on {self.texts} texts"
        if self.relative is None or self.agreement is None:
            return f"{self.tensors} tensors read back, {ids}; {self.reason}."
        return (
            f"{self.tensors} tensors read back, {ids}; logits differ by {self.relative:.2e} of the largest, the likeliest"
            f" token is the same at {self.agreement:.1%} of the positions."
        )


# ---- tensors ------------------------------------------------------------------------------------------------------


def check_shapes(file: Path, tensors: Sequence[GgufTensor]) -> int:
    """Compare names and shapes alone; returns how many tensors there are. Raises ModelError."""
    stored = _stored(file, tensors)
    for tensor in tensors:
        if _shape(stored[tensor.name]) != tensor.source.shape:
            raise failed(f"{tensor.name} is {list(_shape(stored[tensor.name]))}")
    return len(tensors)


def check_tensors(file: Path, tensors: Sequence[GgufTensor]) -> int:
    """Compare every number of a file with what it was rounded from; returns how many tensors there are.

    Raises ModelError that names the first tensor that is missing or differs by more than its type explains.
    """
    stored = _stored(file, tensors)
    for tensor in tensors:
        _check_tensor(file, tensor, stored[tensor.name])
    return len(tensors)


def _stored(file: Path, tensors: Sequence[GgufTensor]) -> dict[str, Any]:
    """What the `gguf` package reads, by name; exactly what is expected."""
    stored = {tensor.name: tensor for tensor in gguf().GGUFReader(file).tensors}
    odd = sorted(stored.keys() ^ {tensor.name for tensor in tensors})
    if odd:
        raise failed(f"{len(odd)} tensors are missing or unknown, for example {odd[0]}")
    return stored


def _shape(stored: Any) -> tuple[int, ...]:
    return tuple(int(length) for length in reversed(stored.shape))


def _check_tensor(file: Path, tensor: GgufTensor, stored: Any) -> None:
    shape = _shape(stored)
    if shape != tensor.source.shape or stored.tensor_type != tensor.type.number:
        raise failed(f"{tensor.name} is {stored.tensor_type.name} {list(shape)}")
    offset = int(stored.data_offset)
    for expected in tensor.rows():
        size = tensor.type.size(expected.shape)
        # Read, not mapped: pages of a mapped file count as memory of this program.
        found = tensor.type.unpack(np.fromfile(file, np.uint8, size, offset=offset).reshape(len(expected), -1))
        offset += size
        if not _fits(found, expected, tensor.type):
            largest = float(np.abs(found - expected).max())
            raise failed(f"{tensor.name} differs by up to {largest:g}, more than {tensor.type.name} explains")


def _fits(found: Rows, expected: Rows, kind: PlainType) -> bool:
    if kind.error == 0:
        return bool((found == _rounded(expected, kind)).all())
    blocks = np.abs(expected).reshape(-1, kind.block)
    allowed = blocks.max(axis=1, keepdims=True) * kind.error + _TINY
    return bool((np.abs(found - expected).reshape(-1, kind.block) <= allowed).all())


def _rounded(numbers: Rows, kind: PlainType) -> Rows:
    """By torch, which is not what wrote them."""
    import torch

    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    rounded: Rows = torch.from_numpy(np.array(numbers)).to(dtypes[kind.name]).float().numpy()
    return rounded


# ---- vocabulary ---------------------------------------------------------------------------------------------------


def check_vocabulary(
    file: Path, vocabulary: Vocabulary, tokenizer: Tokenizer, template: ChatTemplate | None
) -> int | None:
    """Rebuild the tokenizer from a file and compare its ids with the source's; returns the number of texts.

    Raises ModelError with the first text that gets other ids. None when the file's pre-tokenizer is not known here.
    """
    if vocabulary.model == "gpt2" and vocabulary.pre not in PRE_TOKENIZERS:
        return None
    with TemporaryDirectory() as name:
        for text_file, content in tokenizer_files(file).items():
            (Path(name) / text_file).write_bytes(content)
        rebuilt = load_tokenizer(Path(name))
    texts = list(_texts(vocabulary, tokenizer, template))
    for text in texts:
        expected, found = (each.encode(text, special_tokens=True) for each in (tokenizer, rebuilt))
        if found != expected:
            raise ModelError(
                f"llama.cpp would give a text other token ids: {found[:12]} for {text[:60]!r}, the tokenizer gives"
                f" {expected[:12]}.",
                "A GGUF file cannot say what this tokenizer does; use the model's Hugging Face folder.",
            )
    return len(texts)


def _texts(vocabulary: Vocabulary, tokenizer: Tokenizer, template: ChatTemplate | None) -> Iterator[str]:
    """Texts by hand, the golden conversations, every special token inside a text, and random tokens in a row."""
    chats = [each.text for each in render_golden(template, tokenizer)] if template is not None else []
    special = [
        f"a{token}b {token} c"
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in {CONTROL, USER_DEFINED}
    ]
    normal = [index for index, kind in enumerate(vocabulary.types) if kind == NORMAL]
    chance = random.Random(0)  # noqa: S311  # no secret
    mixed = (tokenizer.decode(chance.choices(normal, k=_TOKENS_OF_A_PROBE)) for _ in range(_PROBES))
    for text in (*TEXTS, *chats, *special, *mixed):
        yield unicodedata.normalize("NFC", text) if vocabulary.composes else text


# ---- logits -------------------------------------------------------------------------------------------------------


def check_logits(file: Path, source: Source, kind: str) -> dict[str, Any]:
    """Run the source and the file on a few prompts with transformers; the fields of `ExportCheck` that say how it went.

    `kind` is ggml's name of the type. Raises ModelError when the logits differ by more than it explains. Types of 4 and 5 bits may differ by any
    amount: their tensors were compared already.
    """
    needed = _COPIES * 4 * source.parameters
    if needed > (free := free_memory()):
        return {
            "reason": f"logits were not compared: that takes {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free"
        }
    tokenizer = load_tokenizer(source.tokenizer)
    prompts = [tokenizer.encode(prompt, special_tokens=True)[:_MOST_TOKENS] for prompt in PROMPTS]
    expected = _logits(_built(source), prompts)
    gc.collect()
    found = _logits(_load(file), prompts)
    gc.collect()
    relative = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) / max(
        float(each.abs().max()) for each in expected
    )
    agreeing = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, found, strict=True))
    tolerance = TOLERANCES.get({"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(kind, kind))
    if tolerance is not None and relative > tolerance:
        raise failed(f"its logits differ by {relative:.2e} of the largest, more than {kind} explains ({tolerance:g})")
    return {"relative": relative, "agreement": agreeing / sum(map(len, prompts))}


def _built(source: Source) -> Any:
    """The model in float32, of the tensors that were exported. Not of base and adapters side by side: what several
    adapters compute together is not always what they do when they are merged one after the other."""
    import torch
    import transformers

    state = {name: _tensor(tensor) for name, tensor in source.tensors.items()}
    config = transformers.AutoConfig.for_model(**source.config)
    kind = getattr(transformers, (source.config.get("architectures") or ["AutoModelForCausalLM"])[0])
    with quiet_transformers():
        return kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()


def _tensor(planned: PlannedTensor) -> Tensor:
    import torch

    data = torch.frombuffer(bytearray().join(planned.chunks()), dtype=to_torch(planned.dtype))
    return data.reshape(planned.shape).float()


def _load(file: Path) -> Any:
    """The model as it is read from the file, in float32."""
    import torch

    with quiet_transformers(), without_bars():
        return load_model(file, torch.float32).eval()


def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """float32 [positions, rows] for each prompt."""
    import torch

    with torch.inference_mode():
        return [model(torch.tensor([list(ids)]), use_cache=False).logits[0].float() for ids in prompts]


def failed(problem: str) -> ModelError:
    """The error for a file that is not what it should be."""
    return ModelError(
        f"The GGUF file was read back and is not what was exported: {problem}.",
        "Nothing was kept. Please report this, with the model's name.",
    )


def template_of(tokenizer: Tokenizer, files: ModelFiles) -> ChatTemplate | None:
    """The chat template that goes with the model; None where it has none."""
    named = files.template
    return choose_template(tokenizer, named) if named is not None or tokenizer.chat_template else None
