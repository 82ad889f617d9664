"""The header of a GGUF file: what the model is, its vocabulary, and where each tensor lies.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from calpaca.core.checkpoint.plan import PlannedTensor
from calpaca.core.export.gguf_architecture import GgufArchitecture, Rope
from calpaca.core.export.gguf_types import PlainType, gguf
from calpaca.core.export.gguf_vocabulary import Vocabulary


def make_header(architecture: str, describe: Callable[[Any], None], tensors: Sequence[PlannedTensor]) -> bytes:
    """The bytes before the tensors. `describe` adds its keys to a `gguf.GGUFWriter`."""
    package = gguf()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "header.gguf"
        writer = package.GGUFWriter(file, architecture)
        describe(writer)
        for tensor in tensors:
            kind = package.GGMLQuantizationType[tensor.dtype]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return file.read_bytes()


def describe_model(
    writer: Any, architecture: GgufArchitecture, wanted: PlainType, *, name: str, licence: str | None, parameters: int
) -> None:
    """Keys of the model itself, as llama.cpp's converter writes them."""
    package = gguf()
    writer.add_type(package.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(_size_label(parameters))
    if licence:
        writer.add_license(licence)
    writer.add_file_type(package.LlamaFileType[wanted.file_type])
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    writer.add_block_count(architecture.layers)
    writer.add_context_length(architecture.context_length)
    writer.add_embedding_length(architecture.hidden)
    writer.add_feed_forward_length(architecture.intermediate)
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_layer_norm_rms_eps(architecture.norm_eps)
    writer.add_rope_dimension_count(architecture.head_dim)
    if architecture.head_dim * architecture.heads != architecture.hidden:
        writer.add_key_length(architecture.head_dim)
        writer.add_value_length(architecture.head_dim)
    _describe_rope(writer, architecture.rope)


def _describe_rope(writer: Any, rope: Rope) -> None:
    """Base and stretching. Llama 3's factors are a tensor instead."""
    writer.add_rope_freq_base(rope.theta)
    if rope.kind not in {"linear", "yarn"}:
        return
    writer.add_rope_scaling_type(gguf().RopeScalingType[rope.kind.upper()])
    writer.add_rope_scaling_factor(float(rope.stated["factor"]))
    if rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope.stated["original_max_position_embeddings"]))


def describe_vocabulary(writer: Any, vocabulary: Vocabulary, template: str | None) -> None:
    """Keys of the tokenizer and the chat template."""
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for key, index in vocabulary.special_ids.items():
        getattr(writer, f"add_{key}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if template is not None:
        writer.add_chat_template(template)


def _size_label(parameters: int) -> str:
    """`135M`, `1.1B` …, as hubs call models."""
    scale, letter = (1e9, "B") if parameters >= 1e9 else (1e6, "M")
    number = parameters / scale
    return f"{number:.1f}{letter}" if letter == "B" and number < 10 else f"{round(number)}{letter}"
