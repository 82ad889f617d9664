"""Merging on real weights: every tensor has the bits that PEFT gives it, for each kind of adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel  # noqa: E402

from calpaca.core.checkpoint.reader import open_checkpoint  # noqa: E402
from calpaca.core.files import AdapterFiles, ModelFiles  # noqa: E402
from calpaca.core.jobs import Ledger  # noqa: E402
from calpaca.core.merge import MergeOptions, merge, plan_merge  # noqa: E402
from calpaca.core.spec import ModelSpec  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about tied weights and settings that are meant here

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS, ROWS = 4, 4096  # of 30 and 49,152: enough for every kind
DTYPES = ["bfloat16", "float16", "float32"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def bases(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """SmolLM2, as it is and untied; its first layers and tokens in three dtypes, untied, and with biases."""
    folder = tmp_path_factory.mktemp("bases")
    whole = tensors_of(smollm2)
    layers = tuple(f"model.layers.{number}." for number in range(LAYERS))
    part = {name: each for name, each in whole.items() if "layers" not in name or name.startswith(layers)}
    part[EMBEDDING] = part[EMBEDDING][:ROWS].clone()
    torch.manual_seed(7)
    biases = {
        name.replace("weight", "bias"): torch.randn(len(weight)) for name, weight in part.items() if "self_attn" in name
    }
    small = {"num_hidden_layers": LAYERS, "vocab_size": ROWS}
    made = {dtype: write_base(smollm2, folder / dtype, part, dtype, **small) for dtype in DTYPES}
    made["untied"] = write_base(smollm2, folder / "untied", untied(part), tie_word_embeddings=False, **small)
    made["biased"] = write_base(smollm2, folder / "biased", part | biases, attention_bias=True, **small)
    made["whole"] = write_base(smollm2, folder / "whole", whole)
    made["whole untied"] = write_base(smollm2, folder / "whole untied", untied(whole), tie_word_embeddings=False)
    return made


def untied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, HEAD: tensors[EMBEDDING].clone()}


def write_base(
    source: Path, folder: Path, tensors: Mapping[str, torch.Tensor], dtype: str = "bfloat16", **changes: object
) -> Path:
    """SmolLM2 with other tensors and settings, without its tokenizer."""
    folder.mkdir()
    stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads((source / "config.json").read_text()), "dtype": dtype, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def load(folder: Path, dtype: str, rows: int | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    if rows is not None:
        torch.manual_seed(3)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def make_adapter(
    base: Path, folder: Path, *, seed: int = 1, rows: int | None = None, dtype: str = "float32", **options: object
) -> Path:
    """An adapter with random weights, saved by PEFT in `dtype`; `rows` is the vocabulary that it was trained with."""
    torch.manual_seed(seed)
    model = load(base, "float32", rows)
    settings = {"r": 8, "lora_alpha": 24, "target_modules": TARGETS, **options}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}, file)
    return folder


def merged_by_peft(
    base: Path, *adapters: Path, dtype: str = "bfloat16", rows: tuple[int | None, ...] = (), scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """One after the other, each vocabulary grown before its adapter is put on. The state of the merged model."""
    model = load(base, dtype)
    for number, adapter in enumerate(adapters):
        if rows and rows[number] is not None:
            model.resize_token_embeddings(rows[number], mean_resizing=False)
        adapted = PeftModel.from_pretrained(model, adapter)
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= scale
        model = adapted.merge_and_unload()
    return {**model.state_dict(), "tied": model.config.tie_word_embeddings}


def merged(
    tmp_path: Path, base: Path, *adapters: Path | AdapterFiles, options: MergeOptions = MergeOptions()
) -> dict[str, Any]:
    """What calpaca writes, read back; with both ends of the model even where they are tied."""
    files = [each if isinstance(each, AdapterFiles) else AdapterFiles(each.name, each) for each in adapters]
    output = tmp_path / "merged"
    plan = plan_merge(ModelFiles("base", ModelSpec(), base, tuple(files), base, None), output, options)
    merge(plan, Ledger(tmp_path / "jobs.sqlite"))
    config = json.loads((output / "config.json").read_text())
    tensors = tensors_of(output)
    assert tensors[EMBEDDING].shape[0] == config["vocab_size"]
    assert (HEAD in tensors) is not config["tie_word_embeddings"]
    assert {str(tensor.dtype) for tensor in tensors.values()} == {
        f"torch.{config.get('dtype') or config['torch_dtype']}"
    }
    return {HEAD: tensors[EMBEDDING], **tensors, "tied": config["tie_word_embeddings"]}


def assert_same(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The same names, dtypes, shapes and bits, and tied alike."""
    assert actual.keys() == expected.keys()
    assert actual["tied"] == expected["tied"]
    for name in actual.keys() - {"tied"}:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "rank_pattern": {"down_proj": 4, r"layers\.[01]\.self_attn\.q_proj": 2, "layers.2.mlp.up_proj": 16},
        "alpha_pattern": {"q_proj": 7, "^model.layers.3.mlp.gate_proj": 5},
    },
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "mica": {"init_lora_weights": "mica", "target_modules": ["k_proj"]},
    "some layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 3, "exclude_modules": ["k_proj", "model.layers.3.self_attn.v_proj"]},
    "regular expression": {"target_modules": r".*\.(1|2)\.self_attn\.[qk]_proj"},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved and tied": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True
    },
    "saved norms and mlp": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm", "mlp"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [5, 3, ROWS - 1]},
    "tokens of both": {
        "target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 9]}
    },
}  # fmt: skip


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_each_kind_of_adapter_is_merged_as_peft_does(bases, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = make_adapter(bases["bfloat16"], tmp_path / "adapter", **options)
    assert_same(merged(tmp_path, bases["bfloat16"], adapter), merged_by_peft(bases["bfloat16"], adapter))


def test_the_whole_model(bases, tmp_path: Path) -> None:
    adapter = make_adapter(bases["whole"], tmp_path / "adapter", r=64, lora_alpha=128)
    assert_same(merged(tmp_path, bases["whole"], adapter), merged_by_peft(bases["whole"], adapter))


@pytest.mark.parametrize("kind", ["lora", "dora", "saved both", "tokens"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_in_every_dtype_of_the_base(bases, tmp_path: Path, kind: str, dtype: str) -> None:
    adapter = make_adapter(bases[dtype], tmp_path / "adapter", **KINDS[kind])
    assert_same(merged(tmp_path, bases[dtype], adapter), merged_by_peft(bases[dtype], adapter, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_adapters_in_half_precision_are_widened_first(bases, tmp_path: Path, dtype: str) -> None:
    adapter = make_adapter(bases["bfloat16"], tmp_path / "adapter", dtype=dtype, modules_to_save=["lm_head"])
    assert_same(merged(tmp_path, bases["bfloat16"], adapter), merged_by_peft(bases["bfloat16"], adapter))


def test_another_dtype_is_that_of_the_base_before_the_merge(bases, tmp_path: Path) -> None:
    adapter = make_adapter(bases["bfloat16"], tmp_path / "adapter", modules_to_save=["lm_head"])
    actual = merged(tmp_path, bases["bfloat16"], adapter, options=MergeOptions(dtype="float16"))
    assert_same(actual, merged_by_peft(bases["bfloat16"], adapter, dtype="float16"))


@pytest.mark.parametrize("options", [
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["embed_tokens", "lm_head"]},
    {"target_modules": ["embed_tokens"], "use_dora": True},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 7]},
], ids=["embeddings", "both ends", "dora", "tokens"])  # fmt: skip
def test_the_ends_of_an_untied_base(bases, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = make_adapter(bases["untied"], tmp_path / "adapter", **options)
    assert_same(merged(tmp_path, bases["untied"], adapter), merged_by_peft(bases["untied"], adapter))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_an_adapter_on_one_end_of_a_tied_base_unties_it(bases, tmp_path: Path, targets: list[str]) -> None:
    """PEFT adds to both ends, which changes what the model computes, and advises to untie the base first."""
    adapter = make_adapter(bases["bfloat16"], tmp_path / "adapter", target_modules=[*targets, "q_proj"])
    assert_same(merged(tmp_path, bases["bfloat16"], adapter), merged_by_peft(bases["untied"], adapter))


def test_biases(bases, tmp_path: Path) -> None:
    targets = ["q_proj", "o_proj"]
    added = make_adapter(bases["biased"], tmp_path / "added", target_modules=targets, lora_bias=True)
    trained = make_adapter(bases["biased"], tmp_path / "trained", seed=2, target_modules=targets, bias="all")
    only = make_adapter(bases["biased"], tmp_path / "only", seed=3, target_modules=targets, bias="lora_only")
    adapters = (added, trained, only, added)
    for number, adapter in enumerate(adapters[:3]):
        (tmp_path / str(number)).mkdir()
        assert_same(merged(tmp_path / str(number), bases["biased"], adapter), merged_by_peft(bases["biased"], adapter))


def test_weights_that_lie_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=24, n_layer=2, n_head=2, tie_word_embeddings=True)).to(
        torch.bfloat16
    ).save_pretrained(base)
    for name, options in {"plain": {}, "dora": {"use_dora": True}}.items():
        adapter = make_adapter(base, tmp_path / name, target_modules=["c_attn", "c_proj"], **options)
        output = tmp_path / f"merged {name}"
        files = ModelFiles("base", ModelSpec(), base, (AdapterFiles(name, adapter),), base, None)
        merge(plan_merge(files, output), Ledger(tmp_path / "jobs.sqlite"))
        expected = merged_by_peft(base, adapter)
        for tensor_name, tensor in tensors_of(output).items():
            assert torch.equal(tensor, expected[tensor_name]), tensor_name


def test_a_scale_is_that_of_the_loaded_adapter(bases, tmp_path: Path) -> None:
    adapter = make_adapter(bases["bfloat16"], tmp_path / "adapter", use_dora=True, target_modules=["q_proj"])
    actual = merged(tmp_path, bases["bfloat16"], AdapterFiles("adapter", adapter, 0.7))
    assert_same(actual, merged_by_peft(bases["bfloat16"], adapter, scale=0.7))


# Vocabularies that grow, and several adapters -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "rows"), [("untied", ROWS), pytest.param("whole untied", 49152, marks=pytest.mark.slow)]
)
def test_two_adapters_with_a_growing_vocabulary(bases, tmp_path: Path, name: str, rows: int) -> None:
    """As Chinese-LLaMA-Plus and Alpaca-Plus: the second has one token more and was trained on top of the first."""
    base = bases[name]
    settings = {"modules_to_save": ["embed_tokens", "lm_head"], "dtype": "float16"}
    first = make_adapter(base, tmp_path / "first", rows=rows + 801, **settings)
    second = make_adapter(base, tmp_path / "second", seed=2, rows=rows + 802, **settings)
    actual = merged(tmp_path, base, first, second)
    assert actual[EMBEDDING].shape[0] == rows + 802
    assert_same(actual, merged_by_peft(base, first, second, rows=(rows + 801, rows + 802)))


@pytest.mark.parametrize("options", [
    {}, {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"trainable_token_indices": [1, ROWS + 4]},
], ids=["only grown", "one saved", "both saved", "tokens"])  # fmt: skip
def test_a_tied_vocabulary_that_grows(bases, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = make_adapter(bases["bfloat16"], tmp_path / "adapter", rows=ROWS + 5, target_modules=["q_proj"], **options)
    expected = merged_by_peft(bases["bfloat16"], adapter, rows=(ROWS + 5,))
    assert_same(merged(tmp_path, bases["bfloat16"], adapter), expected)


def test_several_adapters_are_rounded_one_after_the_other(bases, tmp_path: Path) -> None:
    adapters = [
        make_adapter(bases["bfloat16"], tmp_path / "a", target_modules=["q_proj", "up_proj"]),
        make_adapter(bases["bfloat16"], tmp_path / "b", seed=2, target_modules=["up_proj"], use_dora=True),
        make_adapter(bases["bfloat16"], tmp_path / "c", seed=3, target_modules=["up_proj", "v_proj"]),
    ]
    assert_same(merged(tmp_path, bases["bfloat16"], *adapters), merged_by_peft(bases["bfloat16"], *adapters))


def test_float32_accumulation_rounds_once(bases, tmp_path: Path) -> None:
    adapters = [
        make_adapter(bases["bfloat16"], tmp_path / "a", target_modules=["q_proj"]),
        make_adapter(bases["bfloat16"], tmp_path / "b", seed=2, target_modules=["q_proj", "v_proj"]),
    ]
    actual = merged(tmp_path, bases["bfloat16"], *adapters, options=MergeOptions(accumulate="fp32"))
    in_float32 = merged_by_peft(bases["bfloat16"], *adapters, dtype="float32")
    rounded = {name: value.to(torch.bfloat16) for name, value in in_float32.items() if name != "tied"}
    assert_same(actual, rounded | {"tied": True})
    (tmp_path / "compat").mkdir()
    compat = merged(tmp_path / "compat", bases["bfloat16"], *adapters)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(actual[name], compat[name])
