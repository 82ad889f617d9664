"""Training runs on a small real model: what learns, what is saved, and what is refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from calpaca.core.errors import AdapterError, DownloadError, UnsupportedError, UsageError
from calpaca.core.files import find_files
from calpaca.core.merge import MergeOptions, merge, plan_merge
from calpaca.core.spec import AdapterSpec, ModelSpec
from calpaca_trainer.errors import DataError, TrainingError
from calpaca_trainer.learner import load_learner
from calpaca_trainer.metrics import read_metrics
from calpaca_trainer.saved import check_effect, check_tensors, compare, last_checkpoint, norms
from calpaca_trainer.training import prepare, train


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder) if "loss" in record]


def model_of(small: Path, runtime, *adapters: Path):
    spec = ModelSpec(
        model=str(small),
        adapters=[AdapterSpec(source=str(each)) for each in adapters],
        engine="transformers",
        dtype="float32",
    )
    return runtime.model(spec)


def answer(model) -> str:
    from calpaca.core.engine import Sampling

    return model.chat([{"role": "user", "content": "What is 3 and 3?"}], Sampling(max_new_tokens=6)).result().text


def test_a_run_lowers_the_loss_and_its_folder_is_an_adapter(run, small, runtime, tmp_path) -> None:
    folder = run(max_steps=8, eval_share=0.2, samples=1, learning_rate=3e-3)
    measured = [record["eval_loss"] for record in read_metrics(folder) if "eval_loss" in record]
    assert measured[-1] < measured[0] - 1
    assert losses(folder)[-1] < losses(folder)[0]
    for name in ("metrics.jsonl", "loss.png", "report.md", "recipe.toml", "chat_template.jinja", "tokenizer.json"):
        assert (folder / name).stat().st_size
    (sample,) = json.loads((folder / "record/samples.json").read_text())
    assert sample["before"] != sample["after"]
    assert json.loads((folder / "record/environment.json").read_text())["versions"]["torch"] == torch.__version__
    adapted = answer(model_of(small, runtime, folder))
    assert adapted != answer(model_of(small, runtime))
    merged = tmp_path / "merged"
    merge(
        plan_merge(
            find_files(ModelSpec(model=str(small), adapters=[AdapterSpec(source=str(folder))]), runtime),
            merged,
            MergeOptions(),
        ),
        runtime.jobs,
    )
    assert answer(model_of(merged, runtime)) == adapted


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"pissa": True}, id="pissa"),
        pytest.param({"save_modules": ["embed_tokens"]}, id="save"),
        pytest.param({"new_tokens_from": 49150}, id="tokens"),
        pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
        pytest.param({"targets": ["q_proj", "v_proj"], "neftune": 5.0, "dropout": 0.1}, id="neftune"),
        pytest.param({"dtype": "bfloat16", "save_modules": ["lm_head"]}, id="mixed", marks=SLOW),
        pytest.param({"rslora": True}, id="rslora", marks=SLOW),
        pytest.param({"dora": True}, id="dora", marks=SLOW),
        pytest.param({"packing": True, "accumulation": 2}, id="packing", marks=SLOW),
    ],
)
def test_every_method_learns_and_is_used_as_it_is(changes, run, small, runtime) -> None:
    folder = run(max_steps=4, learning_rate=3e-3, **changes)
    assert losses(folder)[-1] < losses(folder)[0]
    model = model_of(small, runtime, folder)
    assert model.engine.capabilities()
    runtime.close()


def test_a_run_s_first_loss_does_not_depend_on_how_the_adapter_begins(run) -> None:
    first = [
        losses(run(name, max_steps=1, **changes))[0] for name, changes in (("plain", {}), ("pissa", {"pissa": True}))
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-4)


def test_computing_activations_twice_changes_no_loss(run) -> None:
    plain = losses(run("plain"))
    assert losses(run("checkpointed", checkpointing="on")) == pytest.approx(plain, rel=1e-5)


def test_an_adapter_goes_on_learning(run, small, runtime) -> None:
    first = run("first", max_steps=4, learning_rate=3e-3, save_modules=["embed_tokens"])
    second = run("second", adapter=str(first), max_steps=2, rank=8)
    assert losses(second)[0] < losses(first)[0] - 0.5
    assert (
        load_file(second / "adapter_model.safetensors").keys() == load_file(first / "adapter_model.safetensors").keys()
    )
    lineage = json.loads((second / "calpaca-manifest.json").read_text())["lineage"]
    assert lineage["settings"]["continues"]
    assert [each["role"] for each in lineage["inputs"]] == ["base"]


def test_training_in_full_gives_a_model(run, runtime, small) -> None:
    folder = run(method="full", trainable=["layers.1.", "norm"], learning_rate=1e-3, max_steps=4)
    assert losses(folder)[-1] < losses(folder)[0]
    before, after = load_file(small / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("layers.1." in name or "norm" in name for name in changed)
    assert answer(model_of(folder, runtime)) != answer(model_of(small, runtime))


def test_plain_texts_are_learnt_whole(run, tmp_path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(
            "The llama is a camelid of the Andes.\n" * 12, encoding="utf-8"
        )
    folder = run(
        stage="pretrain", datasets=[str(tmp_path / "texts")], packing=True, unit="line", max_steps=5, learning_rate=3e-3
    )
    assert losses(folder)[-1] < losses(folder)[0]
    assert json.loads((folder / "record/summary.json").read_text())["examples"] == 72


def test_a_mixture_counts_and_keeps_all_of_its_files(recipe, runtime, rows) -> None:
    more = rows.with_name("more.jsonl")
    more.write_text('{"prompt": "Hi.", "completion": "Hello."}\n', encoding="utf-8")
    it = prepare(recipe(datasets=[str(rows), f"{more}@3"], max_steps=None), "sft", runtime)
    assert len(it.members) == 25
    seen = [number for batch in it.batches for (number,) in batch]
    assert seen.count(24) == 3
    assert it.dataset.place(24) == f"{more}:1"


def test_data_is_rendered_once_and_again_when_anything_changes(recipe, runtime, rows, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    folders = lambda: len(list((tmp_path / "cache/training").iterdir()))  # noqa: E731
    prepare(recipe(), "sft", runtime)
    prepare(recipe(max_steps=9, rank=2), "sft", runtime)
    assert folders() == 1
    prepare(recipe(max_length=64), "sft", runtime)
    prepare(recipe(chat_template="alpaca"), "sft", runtime)
    prepare(recipe(loss_on="last"), "sft", runtime)
    rows.write_text(rows.read_text() + '{"instruction": "Hi.", "output": "Ho."}\n')
    prepare(recipe(), "sft", runtime)
    assert folders() == 5


# What is refused ----------------------------------------------------------------------------------------------------


def test_all_masked_data_is_refused_before_anything_is_loaded(recipe, runtime, rows) -> None:
    with pytest.raises(DataError, match="nothing to learn from: 24 of 24 rows") as caught:
        prepare(recipe(max_length=8), "sft", runtime)
    assert "rows.jsonl:1: " in caught.value.message
    assert "tokens with its prompt, more than --max-length" in caught.value.message


def test_mixed_forms_in_one_file_are_refused_with_their_counts(recipe, runtime, rows) -> None:
    rows.write_text(rows.read_text() + '{"prompt": "Hi.", "completion": "Ho."}\n')
    with pytest.raises(DataError, match="24 of Alpaca, 1 of prompt and completion"):
        prepare(recipe(), "sft", runtime)


def test_quantized_training_without_cuda_is_refused(recipe, runtime) -> None:
    it = prepare(recipe(quantization="4bit"), "sft", runtime)
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        load_learner(it.recipe, it.files, it.prompting)


def test_an_adapter_of_another_base_is_refused_with_numbers(run, recipe, runtime, smollm2) -> None:
    first = run("first", max_steps=1)
    it = prepare(recipe(model=str(smollm2), adapter=str(first)), "sft", runtime)
    with pytest.raises(AdapterError, match="was trained on"):
        load_learner(it.recipe, it.files, it.prompting)


def test_an_adapter_that_is_merged_already_is_refused(run, recipe, runtime, small, tmp_path) -> None:
    first = run("first", max_steps=1)
    files = find_files(ModelSpec(model=str(small), adapters=[AdapterSpec(source=str(first))]), runtime)
    merge(plan_merge(files, tmp_path / "merged", MergeOptions()), runtime.jobs)
    it = prepare(recipe(model=str(tmp_path / "merged"), adapter=str(first)), "sft", runtime)
    with pytest.raises(AdapterError, match="already"):
        load_learner(it.recipe, it.files, it.prompting)


def test_a_target_that_is_not_there_names_those_that_are(recipe, runtime) -> None:
    it = prepare(recipe(targets=["query"]), "sft", runtime)
    with pytest.raises(UsageError) as caught:
        load_learner(it.recipe, it.files, it.prompting)
    assert "q_proj" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "full", "dora": True}, "'dora' belongs to --method lora"),
        ({"trainable": ["norm"]}, "'trainable' belongs to --method full"),
        ({"pissa": True, "weight_decay": 0.1}, "'pissa' goes with none of"),
        ({"patience": 2}, "'patience' needs 'eval_every'"),
        ({"ranks": 3}, "Unknown option"),
        ({"rank": 0}, "--rank is 0"),
        ({"dtype": "float16"}, "--dtype is"),
    ],
)
def test_options_that_do_not_agree_are_refused(changes, told, recipe) -> None:
    with pytest.raises(UsageError, match=told):
        recipe(**changes)


def test_a_loss_that_is_no_number_stops_with_the_row(recipe, runtime, tmp_path, small, rows) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(small)
    token = AutoTokenizer.from_pretrained(small).encode("llama")[-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    model.config.tie_word_embeddings = False
    broken = tmp_path / "broken"
    model.lm_head.weight = torch.nn.Parameter(torch.nan_to_num(model.lm_head.weight.detach().clone()))
    model.save_pretrained(broken)
    for file in (*small.glob("tokenizer*"), *small.glob("chat_template*")):
        (broken / file.name).write_bytes(file.read_bytes())
    rows.write_text(rows.read_text() + '{"instruction": "llama", "output": "llama"}\n')
    it = prepare(recipe(model=str(broken), max_steps=20), "sft", runtime)
    with pytest.raises(TrainingError, match=r"no longer a number in step \d+, at .*rows\.jsonl:25\."):
        train(it, tmp_path / "run", runtime, {})
    assert not (tmp_path / "run" / "calpaca-manifest.json").exists()


def test_early_stopping_ends_a_run_that_no_longer_learns(run) -> None:
    folder = run(max_steps=20, eval_share=0.2, eval_every=1, patience=2, learning_rate=1.0, max_grad_norm=0.0)
    assert len(losses(folder)) < 20


# What is saved ------------------------------------------------------------------------------------------------------


def test_an_empty_broken_or_idle_adapter_becomes_no_file(recipe, runtime) -> None:
    with pytest.raises(TrainingError, match="nothing to save"):
        check_tensors({})
    with pytest.raises(TrainingError, match="a holds NaN"):
        check_tensors({"a": torch.tensor([1.0, float("nan")])})
    it = prepare(recipe(), "sft", runtime)
    learner = load_learner(it.recipe, it.files, it.prompting)
    weights = dict(learner.trained())
    with pytest.raises(TrainingError, match="changed no weight"):
        check_effect(weights, norms(weights))


def test_what_is_written_is_compared_with_what_was_to_be(tmp_path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.ones(3), "b": torch.ones(2)}
    save_file(tensors, tmp_path / "a.safetensors")
    compare(tmp_path / "a.safetensors", tensors)
    with pytest.raises(TrainingError, match="holds 2 tensors, 1 were written"):
        compare(tmp_path / "a.safetensors", {"a": tensors["a"]})
    with pytest.raises(TrainingError, match="norm"):
        compare(tmp_path / "a.safetensors", {**tensors, "b": torch.zeros(2)})
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-3])
    with pytest.raises(TrainingError, match="cannot be opened again"):
        compare(tmp_path / "a.safetensors", tensors)


def test_a_full_disk_is_told_and_leaves_no_half_adapter(recipe, runtime, tmp_path, monkeypatch) -> None:
    import shutil

    it = prepare(recipe(), "sft", runtime)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DownloadError, match=r"0\.0 MB are free"):
        train(it, tmp_path / "run", runtime, {})
    assert not list((tmp_path / "run").rglob("*.safetensors"))


# Going on -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_bit_for_bit(recipe, runtime, tmp_path, monkeypatch) -> None:
    from calpaca_trainer.causal_trainer import CausalTrainer

    it = prepare(recipe(max_steps=7, save_every=2, neftune=5.0, accumulation=2, batch_size=2), "sft", runtime)
    train(it, tmp_path / "whole", runtime, {})
    step = CausalTrainer.training_step

    def failing(self, *arguments, **options):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    monkeypatch.setattr(CausalTrainer, "training_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(it, tmp_path / "cut", runtime, {})
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "cut").name == "checkpoint-4"
    train(it, tmp_path / "cut", runtime, {})
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]


def test_a_half_written_checkpoint_is_passed_over(run) -> None:
    folder = run(max_steps=4, save_every=2)
    assert last_checkpoint(folder).name == "checkpoint-4"
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    assert last_checkpoint(folder).name == "checkpoint-2"
    (folder / "checkpoint-2" / "complete.json").unlink()
    assert last_checkpoint(folder) is None


def test_a_folder_of_another_run_is_not_touched(run, recipe, runtime, tmp_path, rows) -> None:
    folder = run()
    with pytest.raises(UsageError, match="holds a finished run"):
        run()
    (folder / "calpaca-manifest.json").unlink()
    with pytest.raises(UsageError, match=r"learning_rate was 0\.001, is 0\.002"):
        run(learning_rate=2e-3)
    rows.write_text(rows.read_text() + '{"instruction": "Hi.", "output": "Ho."}\n')
    with pytest.raises(UsageError, match="data was"):
        run()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no run of training"):
        run("other")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is no run of training"):
        run("file")
