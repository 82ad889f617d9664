"""Comparing models: what is the same, what differs, and what only looks the same."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest

torch = pytest.importorskip("torch")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from calpaca.core import weights  # noqa: E402
from calpaca.core.compare import CompareOptions, Comparison, changes_logits, compare  # noqa: E402
from calpaca.core.compare.tensors import compare_tensors  # noqa: E402
from calpaca.core.errors import CorruptFileError, ModelError, UsageError  # noqa: E402
from calpaca.core.runtime import Runtime  # noqa: E402
from calpaca.core.settings import Settings  # noqa: E402
from calpaca.core.spec import AdapterSpec, ModelSpec  # noqa: E402

PROMPTS = ("The llama is", "羊驼是一种", "x = [1, 2]")
TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def compared(sources_runtime: Runtime) -> Callable[..., Comparison]:
    """`compared(a, b)` compares folders or specs in float32, with few short prompts."""

    def run(a: Path | ModelSpec, b: Path | ModelSpec, **options: object) -> Comparison:
        one, other = (spec(each) if isinstance(each, Path) else each for each in (a, b))
        return compare(one, other, sources_runtime, CompareOptions(**{"prompts": PROMPTS, "new_tokens": 6, **options}))

    return run


def spec(folder: Path, *adapters: Path | str, dtype: str = "float32") -> ModelSpec:
    return ModelSpec(model=str(folder), adapters=tuple(map(str, adapters)), device="cpu", dtype=dtype)


def save_tokenizer(folder: Path, source: Path) -> None:
    for name in [name for name in TOKENIZER if (source / name).is_file()]:
        (folder / name).write_bytes((source / name).read_bytes())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, small_pieces: Path) -> Path:
    """A small random Llama with a small vocabulary."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, small_pieces)
    return folder


def save_adapter(
    base: Path, folder: Path, *, seed: int = 1, std: float = 0.05, rows: int = 0, **options: object
) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        options["modules_to_save"] = ["embed_tokens", "lm_head"]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std) if std else parameter.zero_()
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def save_merged(base: Path, folder: Path, *adapters: Path, dtype: torch.dtype = torch.float32, rows: int = 0) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).merge_and_unload()
    model.save_pretrained(folder)
    save_tokenizer(folder, base)
    return folder


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapters") / "first", seed=1)


@pytest.fixture(scope="module")
def second(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapters") / "second", seed=2)


def changed(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model with some of its tensors changed."""
    copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


# ---- logits and answers ------------------------------------------------------------------------------------------


def test_a_model_is_identical_to_itself(base: Path, compared) -> None:
    result = compared(base, base)
    assert result.identical
    assert result.within_tolerance
    assert (result.agreement, result.relative, result.tolerance) == (1.0, 0.0, 1e-3)
    assert result.tensors is not None
    assert (result.tensors.equal, result.tensors.differences) == (21, ())
    assert [prompt.parts_at for prompt in result.prompts] == [None] * 3


def test_a_base_with_two_adapters_is_what_they_were_merged_to(
    base: Path, first: Path, second: Path, tmp_path: Path, compared
) -> None:
    merged = save_merged(base, tmp_path / "merged", first, second)
    result = compared(spec(base, first, second), merged)
    assert result.within_tolerance
    assert not result.identical
    assert 0 < result.relative < 1e-5
    assert (result.missing, result.idle, result.tensors) == ((), (), None)


def test_a_merge_that_forgot_one_of_two_adapters_is_found(
    base: Path, first: Path, second: Path, tmp_path: Path, compared
) -> None:
    merged = save_merged(base, tmp_path / "merged", first)
    result = compared(spec(base, first, second), merged, tolerance=1.0)
    assert not result.within_tolerance
    assert result.missing == ("second",)
    assert result.problems == ("Without adapter second the models agree better: the other one lacks it.",)


def test_a_weak_adapter_is_missed_even_where_rounding_is_coarser_than_what_it_does(
    base: Path, tmp_path: Path, compared
) -> None:
    weak = save_adapter(base, tmp_path / "weak", std=0.002)
    stored = save_merged(base, tmp_path / "stored", dtype=torch.bfloat16)
    merged = save_merged(stored, tmp_path / "merged", weak, dtype=torch.bfloat16)
    good, bad = (compared(spec(stored, weak), folder) for folder in (merged, stored))
    assert good.relative <= good.tolerance == bad.tolerance == 1e-1
    assert bad.relative <= bad.tolerance
    assert good.within_tolerance
    assert not bad.within_tolerance
    assert bad.missing == ("weak",)


def test_other_weights_give_other_answers_and_the_first_other_token_is_told(
    base: Path, tmp_path: Path, compared
) -> None:
    def negate(tensors):
        tensors["lm_head.weight"] = -tensors["lm_head.weight"]

    result = compared(base, changed(base, tmp_path / "other", negate))
    assert not result.within_tolerance
    assert result.agreement == 0
    assert [prompt.parts_at for prompt in result.prompts] == [0, 0, 0]
    assert result.tensors.differences[0].name == "lm_head.weight"


def test_a_prompt_of_one_s_own_and_a_tolerance_of_one_s_own(base: Path, second: Path, compared) -> None:
    result = compared(base, spec(base, second), prompts=("一二三",), tolerance=10.0)
    assert [prompt.prompt for prompt in result.prompts] == ["一二三"]
    assert result.relative < result.tolerance
    assert result.missing == ("second",)
    with pytest.raises(UsageError, match="prompt is empty"):
        compared(base, base, prompts=("",))


def test_the_second_model_runs_in_the_dtype_of_the_first(base: Path, compared) -> None:
    result = compared(spec(base, dtype="bfloat16"), spec(base, dtype="auto"))
    assert (result.dtype_a, result.dtype_b, result.identical) == ("bfloat16", "bfloat16", True)
    assert result.tolerance == 1e-1
    other = compared(spec(base, dtype="bfloat16"), spec(base))
    assert (other.dtype_b, other.identical, other.within_tolerance) == ("float32", False, True)


def test_adapters_of_the_same_folder_name_are_told_apart(
    base: Path, first: Path, second: Path, tmp_path: Path, compared
) -> None:
    for number, adapter in enumerate((first, second)):
        copytree(adapter, tmp_path / str(number) / "checkpoint-100")
    adapters = [tmp_path / str(number) / "checkpoint-100" for number in range(2)]
    merged = save_merged(base, tmp_path / "merged", *adapters)
    assert compared(spec(base, *adapters), merged).within_tolerance


def test_everything_can_be_printed_as_json(base: Path, second: Path, compared) -> None:
    content = json.loads(json.dumps(compared(base, spec(base, second)).to_dict()))
    assert content["within_tolerance"] is False
    assert content["largest"] > 0
    assert content["prompts"][1]["prompt"] == "羊驼是一种"


# ---- vocabularies ------------------------------------------------------------------------------------------------


def test_of_two_vocabularies_the_common_ids_are_compared(base: Path, tmp_path: Path, compared) -> None:
    grown = save_merged(base, tmp_path / "grown", rows=2056)
    result = compared(base, grown)
    assert (result.rows_a, result.rows_b, result.ids) == (2048, 2056, 2048)
    assert result.identical
    assert result.same_tokens
    assert [(each.name, each.a, each.b) for each in result.tensors.differences] == [
        ("lm_head.weight", "F32 [2048, 32]", "F32 [2056, 32]"),
        ("model.embed_tokens.weight", "F32 [2048, 32]", "F32 [2056, 32]"),
    ]


def test_a_grown_vocabulary_in_the_adapter_is_what_it_was_merged_to(base: Path, tmp_path: Path, compared) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", rows=2056)
    merged = save_merged(base, tmp_path / "merged", adapter, rows=2056)
    result = compared(spec(base, adapter), merged)
    assert (result.rows_a, result.rows_b) == (2056, 2056)
    assert result.within_tolerance


def test_a_tokenizer_that_gives_other_ids_is_outside_any_tolerance(base: Path, tmp_path: Path, compared) -> None:
    other = copytree(base, tmp_path / "other")
    (other / "added_tokens.json").write_text('{"llama": 100}')
    result = compared(base, other)
    assert not result.same_tokens
    assert not result.within_tolerance
    assert [prompt.same_ids for prompt in result.prompts] == [False, True, True]
    assert result.identical


def test_other_chat_templates_are_told(base: Path, tmp_path: Path, compared) -> None:
    other = copytree(base, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    result = compared(base, other, new_tokens=0)
    assert (result.same_template, result.within_tolerance) == (False, True)
    assert compared(base, base, new_tokens=0).same_template


# ---- adapters without effect -------------------------------------------------------------------------------------


def test_an_adapter_of_zeros_changes_no_logit(
    base: Path, first: Path, tmp_path: Path, compared, sources_runtime
) -> None:
    zeros = save_adapter(base, tmp_path / "zeros", std=0.0)
    result = compared(base, spec(base, zeros))
    assert result.identical
    assert result.idle == ("zeros",)
    assert not changes_logits(spec(base), AdapterSpec(source=str(zeros)), sources_runtime, PROMPTS)
    assert not changes_logits(spec(base, first), AdapterSpec(source=str(zeros)), sources_runtime, PROMPTS)
    assert changes_logits(spec(base), AdapterSpec(source=str(first)), sources_runtime, PROMPTS)


def test_an_adapter_that_only_brings_embeddings_is_not_idle(
    base: Path, tmp_path: Path, compared, sources_runtime
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", std=0.0, rows=2056)
    assert compared(base, spec(base, adapter)).idle == ()
    assert changes_logits(spec(base), AdapterSpec(source=str(adapter)), sources_runtime, PROMPTS)


def test_named_models_of_the_settings_carry_their_adapters(
    base: Path, first: Path, tmp_path: Path, sources_runtime: Runtime
) -> None:
    runtime = Runtime(Settings(models={"mine": spec(base, first)}))
    for component in sources_runtime.sources:
        runtime.sources.add(component, "builtin")
    merged = save_merged(base, tmp_path / "merged", first)
    options = CompareOptions(PROMPTS, new_tokens=0)
    assert compare(ModelSpec(model="mine"), spec(merged), runtime, options).within_tolerance
    assert not changes_logits(ModelSpec(model="mine"), AdapterSpec(source=str(first), scale=0), runtime, PROMPTS)


def test_only_one_model_is_in_memory_at_a_time(base: Path, first: Path, compared, monkeypatch) -> None:
    load_weights = weights.load_weights
    loaded: list[weakref.ref] = []
    alive: list[int] = []

    def load(files):
        alive.append(sum(each() is not None for each in loaded))
        result = load_weights(files)
        loaded.append(weakref.ref(result.model))
        return result

    monkeypatch.setattr(weights, "load_weights", load)
    compared(spec(base, first), base)
    assert alive == [0, 0]


# ---- numbers that are not finite ---------------------------------------------------------------------------------


def test_the_first_layer_that_gives_nan_is_named(base: Path, tmp_path: Path, compared) -> None:
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = torch.nan

    broken = changed(base, tmp_path / "broken", spoil)
    with pytest.raises(
        ModelError, match=r"broken gives logits that are not finite.*model\.layers\.1\.mlp\.up_proj"
    ) as error:
        compared(base, broken)
    assert "its weight has 3 such values" in error.value.message


def test_the_layer_of_an_adapter_that_gives_inf_is_named(base: Path, first: Path, tmp_path: Path, compared) -> None:
    adapter = copytree(first, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if "layers.0.self_attn.q_proj.lora_B" in name)[0, 0] = torch.inf
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj\.lora_B"):
        compared(spec(base, adapter), base)


# ---- tensors -----------------------------------------------------------------------------------------------------


def test_tensors_are_compared_by_name_dtype_shape_and_value(base: Path, tmp_path: Path) -> None:
    def change(tensors):
        tensors["model.norm.weight"][3] += 0.5
        tensors["extra"] = torch.zeros(2)
        del tensors["model.layers.0.input_layernorm.weight"]
        tensors["model.layers.1.input_layernorm.weight"] = tensors["model.layers.1.input_layernorm.weight"].half()
        tensors["model.layers.1.post_attention_layernorm.weight"][0] = torch.nan

    result = compare_tensors(base, changed(base, tmp_path / "other", change))
    found = {each.name: (each.a, each.b, each.largest) for each in result.differences}
    assert result.equal == 17
    assert found["model.norm.weight"] == ("F32 [32]", "F32 [32]", 0.5)
    assert found["extra"] == ("nothing", "F32 [2]", None)
    assert found["model.layers.0.input_layernorm.weight"] == ("F32 [32]", "nothing", None)
    assert found["model.layers.1.input_layernorm.weight"] == ("F32 [32]", "F16 [32]", 0.0)
    assert str(found["model.layers.1.post_attention_layernorm.weight"][2]) == "nan"
    assert len(found) == 5


def test_tensors_do_not_depend_on_the_container(base: Path, tmp_path: Path) -> None:
    other = copytree(base, tmp_path / "other")
    torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    assert compare_tensors(base, other).differences == ()


def test_a_truncated_file_is_an_error_not_a_difference(base: Path, tmp_path: Path, compared) -> None:
    broken = copytree(base, tmp_path / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CorruptFileError, match="truncated"):
        compared(base, broken)


# ---- real weights ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rounding_of_real_weights_stays_within_the_tolerances(smollm2: Path, tmp_path: Path, compared) -> None:
    adapter = save_adapter(smollm2, tmp_path / "adapter", std=0.002, r=64, lora_alpha=128)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        stored = save_merged(smollm2, tmp_path / f"base-{dtype}", dtype=dtype)
        merged = save_merged(stored, tmp_path / f"merged-{dtype}", adapter, dtype=dtype)
        result = compared(spec(stored, adapter), merged, prompts=(), new_tokens=0)
        assert result.within_tolerance, (dtype, result.relative, result.missing)
        assert not compared(spec(stored, adapter), stored, prompts=(), new_tokens=0).within_tolerance
