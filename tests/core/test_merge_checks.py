"""What a merge refuses, what it says, and what it writes: on a small random model and adapters written by hand."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from calpaca.core.adapters import Adapter  # noqa: E402
from calpaca.core.checkpoint import write  # noqa: E402
from calpaca.core.checkpoint.lineage import find_weights, input_of, tensor_records  # noqa: E402
from calpaca.core.checkpoint.manifest import MANIFEST, FileRecord, Lineage, Manifest, read_manifest  # noqa: E402
from calpaca.core.checkpoint.reader import open_checkpoint  # noqa: E402
from calpaca.core.checkpoint.verify import verify  # noqa: E402
from calpaca.core.convert.conversion import plan_conversion  # noqa: E402
from calpaca.core.errors import (  # noqa: E402
    AdapterError,
    CorruptFileError,
    DownloadError,
    ModelError,
    ModelNotFoundError,
    UnsupportedError,
    UsageError,
)
from calpaca.core.files import AdapterFiles, ModelFiles  # noqa: E402
from calpaca.core.fingerprint import file_digest  # noqa: E402
from calpaca.core.jobs import Ledger  # noqa: E402
from calpaca.core.merge import MergeOptions, MergePlan, merge, plan_merge  # noqa: E402
from calpaca.core.merge.order import input_of_adapter  # noqa: E402
from calpaca.core.spec import AdapterSpec, ModelSpec  # noqa: E402
from calpaca.core.template import NamedTemplate  # noqa: E402

HIDDEN, INNER, LAYERS, ROWS = 16, 24, 2, 40
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.{}.self_attn.q_proj"
PREFIX = "base_model.model."

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def write_base(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **config: object) -> Path:
    """A Llama of two layers with random weights, saved without transformers."""
    random = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (ROWS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not config.get("tie_word_embeddings"):
        shapes[HEAD] = (ROWS, HIDDEN)
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{path}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{path}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes |= {f"{path}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    folder.mkdir(parents=True)
    save_file({name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": ROWS,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings | config))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder


def query_pairs(random: torch.Generator, rank: int = 4) -> Tensors:
    pairs = {}
    for layer in range(LAYERS):
        name = PREFIX + QUERY.format(layer)
        pairs[f"{name}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=random)
        pairs[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, rank, generator=random)
    return pairs


def write_adapter(
    folder: Path, *, seed: int = 1, change: Callable[[Tensors], object] = lambda _: None, rows: int | None = None,
    **config: object,
) -> Path:  # fmt: skip
    """A LoRA adapter on the query projections; `change` may do anything to its tensors, None removes a setting."""
    random = torch.Generator().manual_seed(seed)
    tensors = query_pairs(random)
    settings: dict[str, object] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    if rows is not None:
        tensors |= {PREFIX + name: torch.randn(rows, HIDDEN, generator=random) for name in (EMBEDDING, HEAD)}
        settings["modules_to_save"] = ["embed_tokens", "lm_head"]
    change(tensors)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    kept = {key: value for key, value in (settings | config).items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    return folder


def files_of(base: Path, *adapters: Path | AdapterFiles) -> ModelFiles:
    files = tuple(each if isinstance(each, AdapterFiles) else AdapterFiles(each.name, each) for each in adapters)
    spec = ModelSpec(model=str(base), adapters=tuple(AdapterSpec(source=str(each.path)) for each in files))
    return ModelFiles(base.name, spec, base, files, base, None)


def plan(base: Path, *adapters: Path | AdapterFiles, **options: Any) -> MergePlan:
    return plan_merge(files_of(base, *adapters), base.parent / "merged", MergeOptions(**options))


def write_merged(base: Path, *adapters: Path | AdapterFiles, **options: Any) -> Manifest:
    return merge(plan(base, *adapters, **options), Ledger(base.parent / "jobs.sqlite"))


def tensors_of(folder: Path) -> Tensors:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def only_problem(made: MergePlan) -> Exception:
    assert len(made.problems) == 1, made.problems
    return made.problems[0]


def record_training(adapter: Path, base: Path, *parents: Path) -> Path:
    """The manifest that calpaca's trainer writes beside an adapter."""
    inputs = [replace(input_of("base", base.name, base), weights=find_weights(base))]
    inputs += [input_of_adapter(Adapter(AdapterFiles(parent.name, parent))) for parent in parents]
    (file,) = open_checkpoint(adapter).files
    files = {file.name: FileRecord(file.stat().st_size, file_digest(file))}
    manifest = Manifest(Lineage("train", tuple(inputs)), files, tensor_records(open_checkpoint(adapter)))
    (adapter / MANIFEST).write_text(manifest.to_json())
    return adapter


# Adapters that are refused before anything is written -----------------------------------------------------------------
@pytest.mark.parametrize(("config", "message"), [
    ({"r": None}, r"adapter_config.json states no rank \('r'\)"),
    ({"lora_alpha": None}, r"adapter_config.json states no alpha"),
    ({"r": 0}, r"states the rank 0"),
    ({"rank_pattern": {"q_proj(": 4}}, r"has the pattern 'q_proj\(', which cannot be read"),
    ({"r": 8}, r"has rank 4, but adapter_config.json says r = 8"),
    ({"rank_pattern": {"layers.1.self_attn.q_proj": 2}}, r"with rank 2 on a weight of \[16, 16\] it must be \[2, 16\]"),
    ({"target_modules": ["q_proj", "v_proj"]}, r"2 modules are targeted, but got no tensors \(model.layers.0.self_attn.v"),
    ({"target_modules": ["v_proj"], "exclude_modules": ["v_proj"]}, r"2 modules are not targeted .*layers.0.self_attn.q"),
    ({"layers_to_transform": [1]}, r"1 modules are not targeted .*\(model.layers.0.self_attn.q_proj\)"),
    ({"modules_to_save": ["norm"]}, r"should replace norm \(modules_to_save\)"),
    ({"trainable_token_indices": [3]}, r"should replace tokens"),
    ({"use_dora": True}, r"should have lora_A.weight, lora_B.weight, lora_magnitude_vector"),
    ({"lora_bias": True}, r"should have lora_A.weight, lora_B.bias"),
])  # fmt: skip
def test_a_configuration_that_does_not_fit(base: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        plan(base, write_adapter(tmp_path / "adapter", **config))


@pytest.mark.parametrize(("config", "name"), [
    ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
    ({"use_qalora": True}, "use_qalora"),
    ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"a_feature_of_next_year": 3}, "a_feature_of_next_year"),
    ({"init_lora_weights": "pissa_niter_16"}, "initialised by pissa_niter_16"),
    ({"init_lora_weights": "olora"}, "initialised by olora"),
])  # fmt: skip
def test_what_is_not_supported_is_named(base: Path, tmp_path: Path, config: dict[str, Any], name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        plan(base, write_adapter(tmp_path / "adapter", **config))


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(("change", "message"), [
    (lambda each: each.pop(f"{PREFIX}{QUERY.format(1)}.lora_A.weight"), r"q_proj should have .* holds lora_B.weight"),
    (lambda each: each.update({f"{PREFIX}{QUERY.format(1)}.lora_diag": torch.ones(4)}), r"1 of 5 tensors .* no known"),
    (lambda each: each.update({f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, HIDDEN)}),
     r"it changes model.layers.9.mlp.up_proj, which the base does not have"),
    (lambda each: each.update({f"{PREFIX}model.extra.weight": torch.ones(2)}), r"it carries model.extra.weight"),
    (lambda each: each.update({f"{PREFIX}{QUERY.format(1)}.lora_B.weight": torch.ones(HIDDEN + 1, 4)}),
     r"q_proj is for size 17, the base has 16"),
    (lambda each: each.update({f"{PREFIX}{QUERY.format(1)}.lora_A.other.weight": torch.ones(4, HIDDEN)}),
     r"holds two tensors for model.layers.1.self_attn.q_proj.lora_A.weight"),
    (lambda each: each.update({f"{PREFIX}model.norm.weight": torch.ones(HIDDEN + 1)}), r"is \[17\], the base has \[16\]"),
    (lambda each: each.clear(), "holds no tensors"),
])  # fmt: skip
def test_tensors_that_do_not_fit(base: Path, tmp_path: Path, change: Callable[[Tensors], object], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        plan(base, write_adapter(tmp_path / "adapter", change=change))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named_with_tensor_and_file(base: Path, tmp_path: Path, value: float) -> None:
    key = f"{PREFIX}{QUERY.format(1)}.lora_B.weight"
    adapter = write_adapter(tmp_path / "adapter", change=lambda tensors: tensors[key][3].fill_(value))
    with pytest.raises(AdapterError, match=rf"adapter_model.safetensors is damaged: {key} holds .*(nan|inf)"):
        write_merged(base, adapter)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("indices", "message"), [
    ([1, ROWS], r"trains token 40, but model.embed_tokens has 40 rows"), ([-1, 2], "trains token -1"),
    ([1, 2, 3], r"holds \[2, 16\] for tokens of model.embed_tokens; .* lists 3 of them"),
])  # fmt: skip
def test_tokens_that_are_not_there(base: Path, tmp_path: Path, indices: list[int], message: str) -> None:
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = write_adapter(
        tmp_path / "adapter",
        change=lambda each: each.update({key: torch.ones(2, HIDDEN)}),
        trainable_token_indices=indices,
    )
    with pytest.raises(AdapterError, match=message):
        plan(base, adapter)


def test_a_truncated_adapter_and_a_pickle_with_code(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(CorruptFileError, match=r"adapter_model\.safetensors is truncated"):
        plan(base, adapter)
    file.unlink()
    torch.save({"weight": Path("code")}, adapter / "adapter_model.bin")
    with pytest.raises(CorruptFileError, match="holds code instead of tensors; it was not run"):
        plan(base, adapter)


def test_an_adapter_that_changes_nothing(base: Path, tmp_path: Path) -> None:
    def clear(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor.zero_()

    with pytest.raises(AdapterError, match="Adapter zero changes no logit"):
        write_merged(base, write_adapter(tmp_path / "zero", change=clear))
    own = {PREFIX + name: tensor for name, tensor in tensors_of(base).items() if name in {EMBEDDING, HEAD}}
    same = write_adapter(tmp_path / "same", change=lambda each: (clear(each), each.update(own)), rows=ROWS)
    with pytest.raises(AdapterError, match="Adapter same changes no logit"):
        write_merged(base, same)
    with pytest.raises(AdapterError, match="Adapter scaled changes no logit"):
        write_merged(base, AdapterFiles("scaled", write_adapter(tmp_path / "scaled"), 0.0))
    other = write_adapter(tmp_path / "other", change=clear, rows=ROWS)
    assert plan(base, other).problems == ()
    assert "factors are zero" in plan(base, other).notes[0]


def test_whole_tensors_cannot_be_scaled(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"replaces (lm_head|model.embed_tokens).weight and cannot be scaled by 0.5"
    ):
        plan(base, AdapterFiles("half", write_adapter(tmp_path / "adapter", rows=ROWS + 1), 0.5))


def test_only_one_end_of_the_vocabulary_grows(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "adapter",
        rows=ROWS + 2,
        modules_to_save=["embed_tokens"],
        change=lambda each: each.pop(PREFIX + HEAD),
    )
    with pytest.raises(ModelError, match=r"embed_tokens.weight would get 42 rows and lm_head.weight 40"):
        plan(base, adapter)


def test_a_tokenizer_that_is_longer_than_the_embeddings(base: Path, tmp_path: Path, smollm2: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / name, base)
    with pytest.raises(AdapterError, match=r"tokenizer has 49152 tokens, but base and adapters together have 41"):
        plan(base, write_adapter(tmp_path / "adapter", rows=ROWS + 1))


def test_a_sum_that_the_dtype_cannot_hold(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora_alpha=1e6)
    with pytest.raises(ModelError, match=r"q_proj.weight would get values from .* which float16 cannot hold"):
        write_merged(base, adapter, dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_a_quantized_base(base: Path, tmp_path: Path) -> None:
    tensors = tensors_of(base)
    name = f"{QUERY.format(0)}.weight"
    tensors[name] = torch.zeros(HIDDEN, HIDDEN, dtype=torch.uint8)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(UnsupportedError, match=rf"changes {name}, which is stored as U8: the base is quantized"):
        plan(base, write_adapter(tmp_path / "adapter"))


def test_bases_that_are_damaged(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    file = base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is truncated"):
        plan(base, adapter)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match="lacks 2 of the 2 files"):
        plan(base, adapter)
    (base / "model.safetensors.index.json").unlink()
    save_file({name: tensor for name, tensor in load_whole(whole, tmp_path).items() if name != HEAD}, file)
    with pytest.raises(CorruptFileError, match=r"has no lm_head.weight, though its configuration says"):
        plan(base, adapter)
    (base / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        plan(base, adapter)


def load_whole(content: bytes, folder: Path) -> Tensors:
    file = folder / "whole.safetensors"
    file.write_bytes(content)
    return load_file(file)


def test_without_adapters_and_into_a_folder_that_is_taken(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to merge"):
        plan(base)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "file").touch()
    with pytest.raises(UsageError, match="merged exists already"):
        write_merged(base, write_adapter(tmp_path / "adapter"))


# Names of tensors, old and new ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("old", [
    lambda name: name.replace(".weight", ".default.weight"),
    lambda name: name.removeprefix(PREFIX),
    lambda name: name.removeprefix(PREFIX).replace("lora_A.weight", "lora_A.checkpoint_3.weight"),
], ids=["adapter name", "no prefix", "both"])  # fmt: skip
def test_every_version_of_the_names(base: Path, tmp_path: Path, old: Callable[[str], str]) -> None:
    expected = write_merged(base, write_adapter(tmp_path / "new")).weights
    shutil.rmtree(tmp_path / "merged")
    adapter = write_adapter(
        tmp_path / "old", change=lambda each: each.update({old(name): each.pop(name) for name in list(each)})
    )
    assert write_merged(base, adapter).weights == expected


def test_an_adapter_as_the_first_chinese_llama_came(base: Path, tmp_path: Path) -> None:
    """`adapter_model.bin` in float16, whole embeddings under their own names, few settings."""
    new = write_adapter(tmp_path / "new", rows=ROWS + 3)
    expected = write_merged(base, new).weights
    shutil.rmtree(tmp_path / "merged")
    old = tmp_path / "old"
    old.mkdir()
    torch.save(load_file(new / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_config.json").write_text(json.dumps({
        "base_model_name_or_path": "llama", "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "r": 4,
        "lora_alpha": 8, "lora_dropout": 0.05, "merge_weights": False, "enable_lora": None, "peft_type": "LORA",
        "modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
    }))  # fmt: skip
    assert write_merged(base, old).weights == expected


def test_copies_that_peft_leaves_beside_a_trained_module(base: Path, tmp_path: Path) -> None:
    trained = torch.full((HIDDEN,), 0.5)
    adapter = write_adapter(tmp_path / "adapter", modules_to_save=["model.norm"], change=lambda each: each.update({
        f"{PREFIX}model.norm.original_module.weight": torch.zeros(HIDDEN),
        f"{PREFIX}model.norm.modules_to_save.default.weight": trained,
    }))  # fmt: skip
    write_merged(base, adapter)
    assert torch.equal(tensors_of(tmp_path / "merged")["model.norm.weight"], trained.bfloat16())


# What is written ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_any_container_and_shard_size_holds_the_same_tensors(base: Path, tmp_path: Path, format: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", rows=ROWS + 3)
    expected = write_merged(base, adapter).weights
    shutil.rmtree(tmp_path / "merged")
    manifest = write_merged(base, adapter, format=format, shard_size=4_000)
    assert manifest.weights == expected
    assert len([name for name in manifest.files if "-of-0000" in name]) > 1
    assert open_checkpoint(tmp_path / "merged").tensors.keys() == manifest.tensors.keys()
    assert verify(tmp_path / "merged").passed


@pytest.mark.parametrize("parts", [1, 2])
def test_the_original_layout_converts_back_to_the_same_tensors(base: Path, tmp_path: Path, parts: int) -> None:
    from calpaca.core.checkpoint.write import write_model
    from calpaca.core.convert.conversion import plan_conversion

    adapter = write_adapter(tmp_path / "adapter", rows=ROWS + 4)
    expected = write_merged(base, adapter).weights
    shutil.rmtree(tmp_path / "merged")
    write_merged(base, adapter, format="pth", parts=parts)
    assert sorted(each.name for each in (tmp_path / "merged").glob("*.pth")) == [
        f"consolidated.{number:02}.pth" for number in range(parts)
    ]
    conversion = plan_conversion(tmp_path / "merged")
    assert conversion.plan is not None
    assert write_model(conversion.plan, tmp_path / "back", Ledger(tmp_path / "jobs.sqlite")).weights == expected


@pytest.mark.filterwarnings("ignore")  # PEFT's, about adapters that change the base
@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_merged_once_peft_made_it_an_ordinary_one(
    tmp_path: Path, initialisation: str
) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = write_base(tmp_path / "base", dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=initialisation)
    tuned = peft.get_peft_model(model, config)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "start")
    tuned.peft_config["default"].init_lora_weights = initialisation
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.add_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
    tuned.save_pretrained(tmp_path / "as-trained")
    tuned.save_pretrained(tmp_path / "ordinary", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(UnsupportedError, match=f"initialised by {initialisation}"):
        plan(base, tmp_path / "as-trained")
    write_merged(base, tmp_path / "ordinary")
    merged, trained = load_file(tmp_path / "merged" / "model.safetensors"), tuned.merge_and_unload().state_dict()
    for layer in range(LAYERS):
        name = f"{QUERY.format(layer)}.weight"
        torch.testing.assert_close(merged[name], trained[name], rtol=1e-4, atol=1e-4)


def test_the_context_length_outlasts_a_merge_to_pth(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", max_position_embeddings=1234)
    write_merged(base, write_adapter(tmp_path / "adapter"), format="pth")
    conversion = plan_conversion(tmp_path / "merged")
    assert conversion.plan is not None
    assert conversion.plan.settings["context_length"] == 1234
    assert not any("context length" in note for note in conversion.notes)


def test_one_merge_of_two_is_two_merges_of_one(base: Path, tmp_path: Path) -> None:
    first, second = write_adapter(tmp_path / "first", rows=ROWS + 1), write_adapter(tmp_path / "second", seed=2)
    expected = write_merged(base, first, second).weights
    shutil.rmtree(tmp_path / "merged")
    write_merged(base, first, format="bin", shard_size=4_000)
    between = (tmp_path / "merged").rename(tmp_path / "between")
    assert write_merged(between, second).weights == expected


def test_configuration_and_small_files_follow_the_tensors(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", rows=ROWS + 3)
    (adapter / "config.json").write_text('{"rope_scaling": {"type": "linear", "factor": 4}}')
    (base / "LICENSE.txt").write_text("free")
    files = replace(files_of(base, adapter), template=NamedTemplate("{{ messages }}"))
    manifest = merge(plan_merge(files, tmp_path / "merged", MergeOptions(dtype="float16")), Ledger(tmp_path / "jobs"))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"], config["torch_dtype"]) == (ROWS + 3, False, "float16")
    assert "rope_scaling" not in config
    assert (tmp_path / "merged" / "LICENSE.txt").read_text() == "free"
    assert (tmp_path / "merged" / "generation_config.json").read_text() == '{"eos_token_id": 2}'
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert manifest.lineage.template is not None


def test_the_last_tokenizer_is_taken_along(tmp_path: Path, smollm2: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", rows=49152)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, adapter)
    files = replace(files_of(base, adapter), tokenizer=adapter)
    made = plan_merge(files, tmp_path / "merged")
    manifest = merge(made, Ledger(tmp_path / "jobs.sqlite"))
    assert made.notes == ()
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (smollm2 / "tokenizer.json").read_bytes()
    assert manifest.lineage.template is not None


def test_a_stored_head_that_equals_tied_embeddings_is_not_written(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    tensors = tensors_of(base)
    adapter = write_adapter(tmp_path / "adapter")
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, base / "model.safetensors")
    assert HEAD not in plan(base, adapter).recipes
    save_file(tensors | {HEAD: tensors[EMBEDDING] + 1}, base / "model.safetensors")  # transformers does not tie these
    write_merged(base, adapter)
    assert HEAD in tensors_of(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_plan_tells_everything(base: Path, tmp_path: Path) -> None:
    made = plan(base, write_adapter(tmp_path / "adapter", rows=ROWS + 3))
    told = json.loads(json.dumps(made.to_dict()))
    assert told["operations"] == {"copied": 17, "replaced": 2, "LoRA": 2}
    assert told["reshaped"] == {name: {"before": [40, 16], "after": [43, 16]} for name in (EMBEDDING, HEAD)}
    assert told["disk_needed"] == told["size"] == sum(told["files"].values())
    assert told["disk_free"] > told["disk_needed"]
    assert told["memory"] == 3 * 2 * HIDDEN * HIDDEN + 4 * HIDDEN * HIDDEN
    assert told["notes"] == ["Neither the base nor an adapter brings a tokenizer: none is written."]
    assert not (tmp_path / "merged").exists()


# Order, parents and bases ---------------------------------------------------------------------------------------------
def test_the_vocabulary_tells_the_order(base: Path, tmp_path: Path) -> None:
    first, middle = write_adapter(tmp_path / "first", rows=ROWS + 1), write_adapter(tmp_path / "middle", seed=3)
    second = write_adapter(tmp_path / "second", seed=2, rows=ROWS + 2)
    with pytest.raises(AdapterError) as caught:
        plan(base, second, middle, first, force=True)
    assert "second has 42 tokens and first, after it, only 41" in caught.value.message
    assert caught.value.hint == (
        f"Type: calpaca models merge {base} --adapter {first} --adapter {middle} --adapter {second}"
        f" --output {tmp_path / 'merged'}"
    )
    assert plan(base, first, middle, second).problems == ()


@pytest.fixture
def family(base: Path, tmp_path: Path) -> Mapping[str, Path]:
    """A base, a parent adapter trained on it, and a child trained on both."""
    parent = record_training(write_adapter(tmp_path / "parent"), base)
    child = record_training(write_adapter(tmp_path / "child", seed=2), base, parent)
    return {"base": base, "parent": parent, "child": child}


def test_parents_tell_the_order(family, tmp_path: Path) -> None:
    assert plan(*family.values()).problems == ()
    problem = only_problem(plan(family["base"], family["child"], family["parent"]))
    assert "child was trained on top of parent, which comes after it" in str(problem)
    assert (
        f"calpaca models merge {family['base']} --adapter {family['parent']} --adapter {family['child']}"
        f" --output {tmp_path / 'merged'}" in str(problem)
    )
    with pytest.raises(AdapterError, match="wrong order"):
        write_merged(family["base"], family["child"], family["parent"])
    forced = plan(family["base"], family["child"], family["parent"], force=True)
    assert forced.problems == ()
    assert "merged all the same" in forced.notes[0]


def test_a_parent_that_is_missing_is_named(family) -> None:
    problem = only_problem(plan(family["base"], family["child"]))
    assert "child was trained on top of adapter parent, which is neither given before it nor contained" in str(problem)
    assert "--force" in str(problem)


def test_a_parent_that_was_merged_before_is_there(family, tmp_path: Path) -> None:
    write_merged(family["base"], family["parent"])
    merged = (tmp_path / "merged").rename(tmp_path / "with parent")
    assert plan(merged, family["child"]).problems == ()
    on_merged = record_training(write_adapter(tmp_path / "grandchild", seed=5), merged)
    assert plan(merged, on_merged).problems == ()
    assert plan(family["base"], family["parent"], on_merged).problems == ()
    assert "another model" in str(only_problem(plan(family["base"], on_merged)))


def test_an_adapter_that_is_contained_or_given_twice(family, tmp_path: Path) -> None:
    write_merged(family["base"], family["parent"])
    merged = (tmp_path / "merged").rename(tmp_path / "with parent")
    copy = Path(shutil.copytree(family["parent"], tmp_path / "copy"))
    assert "contains adapter copy already" in str(only_problem(plan(merged, copy)))
    assert "copy is given twice" in str(only_problem(plan(family["base"], family["parent"], copy)))
    assert plan(merged, copy, force=True).problems == ()


def test_an_adapter_of_another_base_is_refused_by_its_weights(family, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", seed=9)
    assert "parent was trained on base (weights" in str(only_problem(plan(other, family["parent"])))
    renamed = Path(shutil.copytree(family["base"], tmp_path / "renamed"))
    (renamed / "config.json").write_text((renamed / "config.json").read_text() + "\n")  # the weights are the same
    assert plan(renamed, family["parent"]).problems == ()


def test_the_manifest_names_everything_that_went_in(family, tmp_path: Path) -> None:
    write_merged(family["base"], AdapterFiles("parent", family["parent"], 0.5))
    manifest = read_manifest(tmp_path / "merged")
    assert manifest is not None
    lineage = manifest.lineage
    assert (lineage.operation, lineage.settings) == (
        "merge", {"accumulate": "compat", "dtype": None, "format": "safetensors"}
    )  # fmt: skip
    base, adapter = lineage.inputs
    assert (base.role, base.name, adapter.role, adapter.scale) == ("base", "base", "adapter", 0.5)
    assert adapter.weights == find_weights(family["parent"])
    assert adapter.config["r"] == 4
    assert {"torch", "calpaca"} <= lineage.versions.keys()


# Interrupted and full -------------------------------------------------------------------------------------------------
def test_a_full_disk_names_the_numbers_and_leaves_nothing_finished(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    left = [3_000]

    def write_some(self: Any, piece: Any) -> None:
        left[0] -= len(piece)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("calpaca.core.checkpoint.stream.FileStream._write_all", write_some)
        with pytest.raises(DownloadError, match=r"disk of .*merged.partial is full; merged needs 0.0 MB in all"):
            write_merged(base, adapter)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob("**/.merged.partial/*.safetensors"))
    assert write_merged(base, adapter).weights


def test_too_little_room_is_seen_before(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("calpaca.core.disk.shutil.disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(DownloadError, match=r"merged model needs 0.0 MB in .*, but 0.0 MB are free"):
        write_merged(base, write_adapter(tmp_path / "adapter"))
    assert not list(tmp_path.glob(".merged*"))
    assert write.work_folder(tmp_path / "merged").name == ".merged.partial"
