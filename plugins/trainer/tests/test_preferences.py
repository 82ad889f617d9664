"""Learning from preferences on a small real model: forms, losses, the run folder, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from calpaca.cli.main import main
from calpaca.core.errors import UnsupportedError, UsageError
from calpaca_trainer.errors import DataError
from calpaca_trainer.metrics import read_metrics
from calpaca_trainer.preference_data import check_surroundings
from calpaca_trainer.preferences import Preference, read_preference
from calpaca_trainer.recipe import PreferenceRecipe, read_recipe
from calpaca_trainer.rows import Fault, Row
from calpaca_trainer.training import prepare, train

ASKED = {"role": "user", "content": "Hi."}
GOOD = {"role": "assistant", "content": "Hello."}
BAD = {"role": "assistant", "content": "Go away."}
PAIR = Preference((ASKED,), GOOD, BAD)


def row(**values: object) -> Row:
    return Row(Path("rows.jsonl"), 7, values)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        pytest.param({"prompt": "Hi.", "chosen": "Hello.", "rejected": "Go away."}, PAIR, id="texts"),
        pytest.param({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, PAIR, id="messages"),
        pytest.param({"prompt": "Hi.", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, PAIR, id="conversations"),
        pytest.param({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, PAIR, id="no-prompt"),
        pytest.param(
            {
                "conversations": [{"from": "human", "value": "Hi."}],
                "chosen": {"from": "gpt", "value": "Hello."},
                "rejected": {"from": "gpt", "value": "Go away."},
            },
            PAIR, id="sharegpt",
        ),
        pytest.param(
            {"prompt": "Hi.", "completion": "Hello.", "label": True}, Preference((ASKED,), GOOD, None), id="good"
        ),
        pytest.param(
            {"messages": [ASKED, BAD], "label": False}, Preference((ASKED,), None, BAD), id="bad"
        ),
    ],
)  # fmt: skip
def test_every_form_is_read(values, wanted) -> None:
    assert read_preference(row(**values)) == wanted


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prompt": "Hi.", "chosen": "Hello.", "rejected": "Hello."}, "both answers are the same"),
        ({"prompt": "Hi.", "chosen": "Hello.", "rejected": " "}, "an answer is empty"),
        ({"prompt": "Hi.", "chosen": [ASKED, GOOD], "rejected": [GOOD, ASKED, BAD]}, "to the same prompt"),
        ({"prompt": "", "chosen": "Hello.", "rejected": "Go."}, "nothing is asked"),
        ({"prompt": "Hi.", "chosen": "Hello."}, "those of no preference"),
        ({"prompt": "Hi.", "completion": "Hello.", "label": "perhaps"}, "label: "),
        ({"messages": [ASKED], "label": True}, "nothing is asked"),
    ],
    ids=["same", "empty", "prompts", "unasked", "columns", "label", "unanswered"],
)
def test_a_row_that_is_no_preference_is_named(values, told) -> None:
    fault = read_preference(row(**values))
    assert isinstance(fault, Fault)
    assert str(fault).startswith("rows.jsonl:7: ")
    assert told in fault.reason


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twelve pairs, of which the better answer is always the polite one."""
    file = tmp_path / "pairs.jsonl"
    texts = [
        {"prompt": f"Say {number}.", "chosen": f"Gladly: {number}.", "rejected": f"No. {'Never. ' * (number % 3)}"}
        for number in range(12)
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in texts), "utf-8")
    return file


@pytest.fixture
def preference_recipe(small, pairs):
    def make(**changes) -> PreferenceRecipe:
        values = {
            "model": str(small), "datasets": [str(pairs)], "dtype": "float32", "max_length": 96, "max_steps": 4,
            "batch_size": 4, "samples": 0, "learning_rate": 5e-3, "warmup": 0.0, "rank": 4,
        }  # fmt: skip
        return read_recipe(None, values | changes, "train dpo", PreferenceRecipe)

    return make


def trained(recipe, runtime, output: Path) -> list[dict]:
    pytest.importorskip("trl")
    train(prepare(recipe, "dpo", runtime), output, runtime, {})
    return read_metrics(output)


@pytest.mark.slow
def test_pairs_are_learnt_and_the_folder_is_an_adapter(preference_recipe, runtime, tmp_path) -> None:
    records = trained(preference_recipe(eval_share=0.3, samples=1), runtime, tmp_path / "run")
    steps = [record for record in records if "loss" in record]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the model is its own reference yet
    assert steps[-1]["loss"] < 0.5
    measured = [record for record in records if "eval_loss" in record]
    assert measured[-1]["eval_loss"] < measured[0]["eval_loss"]
    assert measured[-1]["eval_rewards/accuracies"] == 1.0
    folder = tmp_path / "run"
    for name in ("adapter_config.json", "calpaca-manifest.json", "report.md", "loss.png", "chat_template.jinja"):
        assert (folder / name).stat().st_size
    assert not (folder / "README.md").exists()
    assert json.loads((folder / "calpaca-manifest.json").read_text())["lineage"]["settings"]["stage"] == "dpo"
    recorded = read_recipe(folder / "recipe.toml", {}, "train dpo", PreferenceRecipe)
    assert (recorded.loss, recorded.beta) == ("dpo", 0.1)


@pytest.mark.slow
def test_the_reference_is_the_adapter_that_goes_on(preference_recipe, runtime, tmp_path) -> None:
    trained(preference_recipe(max_steps=2), runtime, tmp_path / "first")
    records = trained(preference_recipe(adapter=str(tmp_path / "first"), max_steps=1), runtime, tmp_path / "second")
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.slow
def test_ratings_are_learnt(preference_recipe, runtime, tmp_path) -> None:
    records = trained(preference_recipe(loss="kto", max_steps=8, learning_rate=1e-3), runtime, tmp_path / "run")
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] == pytest.approx(0.5, abs=1e-3)
    assert losses[-1] < 0.45


@pytest.mark.slow
def test_an_interrupted_run_goes_on_bit_for_bit(preference_recipe, runtime, tmp_path, monkeypatch) -> None:
    from calpaca_trainer.causal_trainer import CausalTrainer

    recipe = preference_recipe(max_steps=5, save_every=2, accumulation=2, batch_size=2)
    whole = trained(recipe, runtime, tmp_path / "whole")
    step = CausalTrainer.training_step

    def failing(self, *arguments, **options):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    with monkeypatch.context() as interrupting:
        interrupting.setattr(CausalTrainer, "training_step", failing)
        with pytest.raises(KeyboardInterrupt):
            trained(recipe, runtime, tmp_path / "cut")
    cut = trained(recipe, runtime, tmp_path / "cut")
    assert [each["loss"] for each in cut] == [each["loss"] for each in whole]
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "full"}, "'method' is for sft"),
        ({"packing": True}, "'packing' is for sft"),
        ({"loss": "kto", "batch_size": 1}, "at least 2"),
        ({"bad_weight": 2.0}, "belong to --loss kto"),
    ],
    ids=["full", "packing", "alone", "weights"],
)
def test_options_that_do_not_agree_are_refused(changes, told, preference_recipe) -> None:
    with pytest.raises(UsageError, match=told):
        preference_recipe(**changes)


def test_rows_that_cannot_be_used_are_listed(preference_recipe, runtime, pairs) -> None:
    good = pairs.read_text()
    pairs.write_text(good + '{"prompt": "a", "completion": "b", "label": true}\n')
    it = prepare(preference_recipe(), "dpo", runtime)
    (fault,) = it.dataset.faults
    assert str(fault).startswith(f"{pairs}:13: one answer alone")
    pairs.write_text(good)
    with pytest.raises(DataError, match=r"12 of 12 rows cannot be used.* more than --max-length"):
        prepare(preference_recipe(max_length=10), "dpo", runtime)


def test_several_processes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="in one process, and there are 2"):
        check_surroundings(2)


def test_data_check_shows_both_answers(small, pairs, capsys) -> None:
    typed = ["train", "data", "check", "--model", str(small), "--dataset", str(pairs), "--stage"]
    assert main([*typed, "dpo"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("12 examples, ")
    assert [line[0] for line in shown[3:]] == [" ", "+", "-"]
    assert shown[4] == "+ 'Gladly: 0.'"
    pairs.write_text(pairs.read_text() + '{"prompt": "a", "completion": "b", "label": true}\n', "utf-8")
    assert main([*typed, "dpo", "--json"]) == 1
    assert [each["line"] for each in json.loads(capsys.readouterr().out)["faults"]] == [13]
    assert main([*typed, "kto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 25


def test_ratings_all_alike_are_refused(preference_recipe, runtime, pairs) -> None:
    pairs.write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 4)
    with pytest.raises(DataError, match="All 4 answers are good"):
        prepare(preference_recipe(loss="kto"), "dpo", runtime)
