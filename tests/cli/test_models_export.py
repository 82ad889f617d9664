"""`calpaca models export` as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 300,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A LLaMA of random numbers whose tokenizer knows bytes and two control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    from calpaca.core.template import NAMED_TEMPLATES

    folder = tmp_path / "tiny"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "th"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(NAMED_TEMPLATES["chatml"].source)
    return folder


@pytest.fixture
def adapter(model: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(model.with_name("lora"))
    return model.with_name("lora")


def test_the_folder_that_was_written_is_the_answer(calpaca, model: Path) -> None:
    done = calpaca("models", "export", "tiny", "--output", "out")
    assert (done.code, done.out) == (0, "out\n")
    assert "12 tensors read back, equal token ids on" in done.err
    assert "logits differ by" in done.err
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "Modelfile", "calpaca-manifest.json", "model-f16.gguf"
    ]  # fmt: skip
    assert calpaca("models", "verify", "out").code == 0
    shown = calpaca("models", "show", "out", "--json").json
    assert (shown["format"], shown["dtype"], shown["architecture"]) == ("gguf", "float16", "llama")
    assert calpaca("models", "export", "tiny", "--output", "out").code == 2


def test_json_says_what_was_compared(calpaca, model: Path) -> None:
    done = calpaca("models", "export", "./tiny", "--type", "Q8_0", "-o", "out", "--no-logits", "--json")
    assert done.code == 0
    answer = done.json
    assert (answer["output"], answer["files"]) == ("out", ["model-q8_0.gguf", "Modelfile"])
    assert answer["tensors"] == 12
    assert answer["texts"] > 300
    assert answer["relative"] is None
    assert answer["reason"] == "logits were not compared"


def test_adapters_go_in_on_the_way_or_into_a_file_of_their_own(calpaca, model: Path, adapter: Path) -> None:
    merged = calpaca("models", "export", "tiny", "--adapter", "./lora", "-o", "merged", "--json")
    plain = calpaca("models", "export", "tiny", "-o", "plain", "--json")
    assert (merged.code, plain.code) == (0, 0)
    assert merged.json["weights"] != plain.json["weights"]
    alone = calpaca("models", "export", "./lora", "--base", "tiny", "-o", "alone")
    assert (alone.code, alone.out) == (0, "alone\n")
    assert "4 tensors read back" in alone.err
    lines = Path("alone/Modelfile").read_text().splitlines()
    assert lines[::2][:2] == ["FROM tiny", "ADAPTER ./adapter-f32.gguf"]
    assert 'PARAMETER stop "<|im_end|>"' in lines


def test_an_adapter_without_its_base_is_refused_with_the_command(calpaca, adapter: Path) -> None:
    done = calpaca("models", "export", "./lora", "-o", "out")
    assert done.code == 2
    assert "--base MODEL" in done.err
    assert not Path("out").exists()


def test_a_hugging_face_folder_has_a_manifest(calpaca, model: Path, adapter: Path) -> None:
    done = calpaca("models", "export", "tiny", "--format", "hf", "-o", "hf")
    assert (done.code, done.out) == (0, "hf\n")
    assert calpaca("models", "verify", "hf").code == 0
    assert calpaca("models", "compare", "tiny", "hf").code == 0
    refused = calpaca("models", "export", "tiny", "--format", "hf", "--adapter", "./lora", "-o", "other")
    assert refused.code == 2
    assert "calpaca models merge tiny --adapter ./lora --output other" in refused.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--type", "q9_0"], 2, "Unknown GGUF type 'q9_0'"),
        (["--format", "hf", "--type", "q8_0"], 2, "--type is for GGUF files"),
        (["--base", "tiny", "--format", "hf"], 2, "NAME is the adapter"),
    ],
)
def test_what_cannot_be_is_refused(calpaca, model: Path, arguments: list[str], code: int, message: str) -> None:
    done = calpaca("models", "export", "tiny", "-o", "out", *arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert not Path("out").exists()


def test_k_quants_need_llama_cpp(calpaca, model: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    done = calpaca("models", "export", "tiny", "-o", "out", "--type", "q4_k_m")
    assert done.code == 3
    assert "llama-quantize" in done.err
    assert "q8_0" in done.err
