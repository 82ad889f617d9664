"""Adapters on a base: what PEFT would compute, several in order, and everything that must be refused first."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest

torch = pytest.importorskip("torch")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from calpaca.core.errors import AdapterError, CorruptFileError, UnsupportedError  # noqa: E402
from calpaca.core.files import AdapterFiles, ModelFiles  # noqa: E402
from calpaca.core.jobs import Ledger  # noqa: E402
from calpaca.core.merge import merge, plan_merge  # noqa: E402
from calpaca.core.spec import ModelSpec  # noqa: E402
from calpaca.core.weights import load_weights  # noqa: E402

IDS = torch.arange(5, 25).reshape(2, 10)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A small random Llama with SmolLM2's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((smollm2 / name).read_bytes())
    return folder


def make_adapter(base: Path, folder: Path, *, seed: int = 1, rows: int | None = None, **options: object) -> Path:
    """A LoRA adapter with random weights, saved by PEFT; `rows` makes it bring longer embeddings."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
        options["modules_to_save"] = ["embed_tokens", "lm_head"]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load(base: Path, *adapters: Path | tuple[Path, float]):
    files = [
        AdapterFiles(adapter.name, adapter) if isinstance(adapter, Path) else AdapterFiles(adapter[0].name, *adapter)
        for adapter in adapters
    ]
    spec = ModelSpec(device="cpu", dtype="float32")
    return load_weights(ModelFiles("base", spec, base, tuple(files), base, None))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 32}}],
    ids=["lora", "rslora", "dora", "patterns"],
)
def test_logits_equal_those_of_peft(base: Path, tmp_path: Path, options: dict) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    actual = logits(load(base, adapter).model)
    assert torch.equal(actual, logits(expected.eval()))
    assert not torch.allclose(actual, logits(load(base).model))


def test_two_adapters_add_up(base: Path, tmp_path: Path) -> None:
    first = make_adapter(base, tmp_path / "first", seed=1)
    second = make_adapter(base, tmp_path / "second", seed=2)
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in (first, second):
        merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    assert torch.allclose(logits(load(base, first, second).model), logits(merged), atol=1e-5)


@pytest.mark.parametrize("tokens", ["first", "second"])
def test_two_adapters_add_up_when_one_has_rows_of_single_tokens(base: Path, tmp_path: Path, tokens: str) -> None:
    rows = {"trainable_token_indices": [int(IDS[0, 0]), 7]}
    first = make_adapter(base, tmp_path / "first", seed=1, **(rows if tokens == "first" else {}))
    second = make_adapter(base, tmp_path / "second", seed=2, **(rows if tokens == "second" else {}))
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in (first, second):
        merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    assert torch.allclose(logits(load(base, first, second).model), logits(merged), atol=1e-5)


def test_a_scale_of_zero_leaves_the_base(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    assert torch.allclose(logits(load(base, (adapter, 0.0)).model), logits(load(base).model))


def test_an_adapter_with_a_longer_vocabulary_brings_its_embeddings(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", rows=49160)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(49160, mean_resizing=False)
    expected = PeftModel.from_pretrained(model, adapter).eval()
    loaded = load(base, adapter)
    assert loaded.vocabulary_size == 49160
    assert torch.equal(logits(loaded.model), logits(expected))


def test_of_two_longer_vocabularies_the_last_stands(base: Path, tmp_path: Path) -> None:
    first = make_adapter(base, tmp_path / "first", seed=1, rows=49156)
    second = make_adapter(base, tmp_path / "second", seed=2, rows=49157)
    loaded = load(base, first, second)
    kept = load_file(second / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(loaded.model.get_input_embeddings().weight, kept)
    assert logits(loaded.model).shape[-1] == 49157


def test_two_adapters_in_the_wrong_order_are_named(base: Path, tmp_path: Path) -> None:
    first = make_adapter(base, tmp_path / "first", rows=49156)
    second = make_adapter(base, tmp_path / "second", rows=49157)
    with pytest.raises(AdapterError, match=r"49157 tokens and first.*only 49156.*--adapter first --adapter second"):
        load(base, second, first)


def test_an_adapter_that_was_merged_into_the_base_is_told(base: Path, tmp_path: Path, caplog) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    files = ModelFiles("base", ModelSpec(), base, (AdapterFiles("adapter", adapter),), base, None)
    merge(plan_merge(files, tmp_path / "merged"), Ledger(tmp_path / "jobs.sqlite"))
    copy = copytree(adapter, tmp_path / "copy")
    load(tmp_path / "merged", copy)
    assert caplog.messages == [
        "base contains adapter copy already: it was merged into it and counts twice now. Leave it out."
    ]
    caplog.clear()
    load(tmp_path / "merged", make_adapter(base, tmp_path / "other", seed=2))
    load(base, adapter)
    assert caplog.messages == []


def test_an_adapter_for_another_base_is_refused_with_the_sizes(base: Path, smollm2: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"made for another base: .* is for size 64, the base has 1536"):
        load(smollm2, adapter)


def test_a_rank_that_is_not_the_configs_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    change_config(adapter, r=16)
    with pytest.raises(AdapterError, match=r"has rank 4, but adapter_config.json says r = 16"):
        load(base, adapter)


def test_a_config_without_a_rank_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    change_config(adapter, r=None)
    with pytest.raises(AdapterError, match="states no rank"):
        load(base, adapter)


def test_another_kind_of_adapter_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    change_config(adapter, peft_type="PREFIX_TUNING")
    with pytest.raises(UnsupportedError, match="PREFIX_TUNING"):
        load(base, adapter)


def test_a_tensor_that_the_config_does_not_place_is_found(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    change_config(adapter, target_modules=["q_proj", "v_proj"])
    with pytest.raises(AdapterError, match="4 of 12 tensors found no place"):
        load(base, adapter)


def test_a_place_that_gets_no_tensor_is_found(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="1 places got no tensor"):
        load(base, adapter)


def test_an_empty_checkpoint_of_443_bytes_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match="holds no tensors"):
        load(base, adapter)


def test_a_truncated_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match="is truncated"):
        load(base, adapter)


def test_a_longer_tokenizer_without_embeddings_is_refused(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    adapter = make_adapter(base, tmp_path / "adapter")
    longer = copytree(base, tmp_path / "longer")
    tokenizer = AutoTokenizer.from_pretrained(longer)
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save_pretrained(longer)
    spec = ModelSpec(device="cpu")
    with pytest.raises(AdapterError, match=r"tokenizer has 49153 tokens.*49152 embedding"):
        load_weights(ModelFiles("base", spec, base, (AdapterFiles("adapter", adapter),), longer, None))


def test_base_and_adapter_and_scaled_adapter_have_three_fingerprints(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    kinds = [(), (AdapterFiles("a", adapter),), (AdapterFiles("a", adapter, 0.5),)]
    prints = {ModelFiles("base", ModelSpec(), base, kind, base, None).fingerprint for kind in kinds}
    assert len(prints) == 3


def change_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
