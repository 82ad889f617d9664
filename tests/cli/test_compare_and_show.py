"""`calpaca models compare` and `calpaca models show`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest

from calpaca.core.checkpoint.manifest import MANIFEST, Input, Lineage, Manifest

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A tiny random model with SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=49152, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=512, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((smollm2 / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def other(tiny: Path) -> Path:
    from safetensors.torch import load_file, save_file

    folder = copytree(tiny, tiny.parent / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = -tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- compare -----------------------------------------------------------------------------------------------------


def test_the_same_model_twice_is_the_same(calpaca, tiny: Path) -> None:
    result = calpaca("models", "compare", str(tiny), str(tiny), "--prompt", "Hi", "--max-new-tokens", "3")
    assert result.code == 0
    assert "All logits are identical." in result.out
    assert "Same greedy answer        1 of 1 prompts" in result.out
    assert "Same tensors              12 of 12" in result.out


def test_another_model_is_told_apart_with_exit_code_1(calpaca, tiny: Path, other: Path) -> None:
    result = calpaca("models", "compare", str(tiny), str(other), "--prompt", "Hi there", "--max-new-tokens", "3")
    assert result.code == 1
    assert "the tolerance is 0.001." in result.out
    assert "after 'Hi there' they part at token 0" in result.out
    assert "model.norm.weight: F32 [8], largest difference 2" in result.out


def test_a_tolerance_given_decides_the_exit_code_and_json_has_everything(calpaca, tiny: Path, other: Path) -> None:
    arguments = ("models", "compare", str(tiny), str(other), "--prompt", "Hi", "--max-new-tokens", "0", "--json")
    result = calpaca(*arguments, "--tolerance", "3")
    assert result.code == 0
    assert result.json["within_tolerance"] is True
    assert result.json["tensors"]["differences"][0]["name"] == "model.norm.weight"
    assert calpaca(*arguments).code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["models", "compare", "smollm2-135m-instruct"], 2, "Missing argument 'B'"),
        (["models", "compare", "smolm2-135m-instruct", "x"], 3, "Did you mean 'smollm2-135m-instruct'?"),
        (["models", "compare", "smollm2-135m-instruct", "./none"], 3, "none does not exist."),
        (["models", "show", "./none.pth"], 3, "none.pth does not exist."),
    ],
)
def test_wrong_names_say_what_to_type(calpaca, arguments: list[str], code: int, message: str) -> None:
    result = calpaca(*arguments)
    assert result.code == code
    assert message in result.err
    assert result.out == ""


# ---- show --------------------------------------------------------------------------------------------------------


def test_show_describes_a_model_with_its_lineage_and_memory(calpaca, tiny: Path, tmp_path: Path) -> None:
    model = copytree(tiny, tmp_path / "merged")
    base = Input("base", "llama", "b" * 64, "", made_of=(Input("base", "first", "a" * 64, ""),))
    lineage = Lineage("merge", (base, Input("adapter", "plus", "c" * 64, "", 0.5)), {"accumulate": "compat"})
    (model / MANIFEST).write_text(Manifest(lineage, {}, {}).to_json())
    shown = calpaca("models", "show", str(model)).out
    lines = shown.splitlines()
    assert "vocabulary      49,152" in lines
    assert "template        its own (sha256 872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788)" in lines
    start = lines.index("lineage         merge (accumulate compat) of")
    assert lines[start + 1 : start + 4] == [
        "                  base llama (bbbbbbbbbbbb)",
        "                    base first (aaaaaaaaaaaa)",
        "                  adapter plus (cccccccccccc, scale 0.5)",
    ]
    assert any(line.split()[:2] == ["8bit", "2"] for line in lines)
    described = calpaca("models", "show", str(model), "--json").json
    assert described["lineage"]["inputs"][0]["made_of"][0]["name"] == "first"
    assert [need["dtype"] for need in described["memory"]] == ["float32", "bfloat16 or float16", "8bit", "4bit"]
    assert described["adapters"] == []


def test_show_lists_the_adapters_that_the_settings_put_on_a_model(calpaca, tiny: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "mine"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "calpaca.toml").write_text(f"[models.both]\nmodel = '{tiny}'\nadapters = ['{adapter}']\n")
    shown = calpaca("models", "show", "both").out
    assert "name            tiny" in shown
    assert "adapter         DoRA, rank 8, alpha 16" in shown
    assert calpaca("models", "show", "both", "--json").json["adapters"][0]["adapter"]["kind"] == "DoRA"


def test_show_says_what_a_file_is(calpaca, tiny: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "consolidated.00.pth")
    shown = calpaca("models", "show", "consolidated.00.pth")
    assert shown.code == 0
    assert "No known file. For a file that PyTorch wrote that proves nothing" in shown.out
    described = calpaca("models", "show", str(tiny / "model.safetensors"), "--json").json
    assert (described["known"], described["tensors"], described["dtype"]) == (None, 12, "float32")
    assert described["remark"] == "No known file."


def test_show_template_prints_golden_conversations_and_their_ids(calpaca, tiny: Path) -> None:
    shown = calpaca("models", "show", str(tiny), "--template").out
    assert "== Chinese, " in shown
    assert "<|im_start|>user\nWhat is a llama?<|im_end|>\n<|im_start|>assistant" in shown
    described = calpaca("models", "show", str(tiny), "--template", "--chat-template", "chatml", "--json").json
    assert described["template"] == "chatml"
    single = described["conversations"][0]
    assert single["text"] == "<|im_start|>user\nWhat is a llama?<|im_end|>\n<|im_start|>assistant\n"
    assert single["token_ids"][0] == 1


def test_a_model_without_a_template_says_what_to_choose(calpaca, tiny: Path, tmp_path: Path) -> None:
    model = copytree(tiny, tmp_path / "bare")
    (model / "chat_template.jinja").unlink()
    result = calpaca("models", "show", str(model), "--template")
    assert result.code == 2
    assert "bare brings no chat template." in result.err
    assert "Name one with --chat-template: alpaca, llama2-zh, chatml." in result.err
