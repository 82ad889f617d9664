"""The commands: what is typed, what is printed where, and exit codes."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator

import pytest

from calpaca.cli.main import main
from calpaca.plugins import wiring
from calpaca_trainer.commands.init import SCENARIOS
from calpaca_trainer.recipe import PreferenceRecipe, Recipe, read_recipe


@pytest.fixture
def typed(small, rows, monkeypatch) -> Iterator[list[str]]:
    """The options of a small run. The program has a runtime of its own: another test's job ledger is not seen."""
    monkeypatch.setattr(wiring, "_shared", None)
    yield ["--model", str(small), "--dataset", str(rows), "--max-length", "128"]
    wiring.runtime().close()


def test_data_check_shows_what_is_learnt_token_by_token(typed, capsys) -> None:
    assert main(["train", "data", "check", *typed, "--example", "2"]) == 0
    out = capsys.readouterr().out
    assert "24 rows of Alpaca, 24 examples" in out
    marked = [line for line in out.splitlines() if line.startswith("+")]
    assert marked[0].endswith("'It'")
    assert marked[-1].endswith("'<|im_end|>'")


def test_data_check_lists_every_bad_row_and_fails(typed, rows, capsys) -> None:
    rows.write_text('{"instruction": "Hi.", "output": ""}\n{"instruction"\n' + rows.read_text())
    assert main(["train", "data", "check", *typed]) == 1
    out = capsys.readouterr().out
    assert "2 rows cannot be used:" in out
    assert "rows.jsonl:1: output: " in out
    assert "rows.jsonl:2: no valid JSON" in out
    assert main(["train", "data", "check", *typed, "--json"]) == 1
    assert [fault["line"] for fault in json.loads(capsys.readouterr().out)["faults"]] == [1, 2]


def test_sft_prints_its_folder_and_jobs_know_it(typed, tmp_path, capsys) -> None:
    output = tmp_path / "run"
    options = ["--max-steps", "2", "--samples", "0", "--dtype", "float32", "--output", str(output)]
    assert main(["train", "sft", *typed, *options]) == 0
    result = capsys.readouterr()
    assert result.out == f"{output}\n"
    assert "memory" not in result.out
    assert "together" in result.err
    assert main(["jobs", "list"]) == 0
    assert "2/2" in capsys.readouterr().out
    assert main(["train", "sft", *typed, *options]) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_an_estimate_trains_nothing(typed, tmp_path, capsys) -> None:
    assert main(["train", "sft", *typed, "--estimate"]) == 0
    shown = capsys.readouterr().out
    assert "gradients and optimiser" in shown
    assert main(["train", "sft", *typed, "--estimate", "--json", "--rank", "64"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] > 0


def test_a_recipe_is_read_and_flags_go_before_it(typed, tmp_path, small, rows, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {small}\ndatasets: ['{rows}']\nmax_length: 128\nmax_steps: 9\nrank: 4\n")
    assert main(["train", "sft", str(recipe), "--max-steps", "7", "--estimate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 7


@pytest.mark.parametrize(
    ("text", "told"),
    [("rnk = 3", "Did you mean 'rank'?"), ("rank = ", "cannot be read"), ("rank = 'x'", "Option --rank is 'x'")],
)
def test_a_wrong_recipe_is_named(text, told, tmp_path, capsys) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    assert main(["train", "sft", str(recipe), "--output", str(tmp_path / "run")]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--output", "run"]], ids=["nowhere", "nothing"])
def test_what_is_missing_is_asked_for(arguments, capsys) -> None:
    assert main(["train", "sft", *arguments]) == 2
    assert ("Add --output" in (err := capsys.readouterr().err)) or "--dataset" in err


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_init_writes_a_recipe_that_is_valid(scenario, tmp_path, capsys) -> None:
    file = tmp_path / "recipe.toml"
    assert main(["train", "init", scenario, "--output", str(file)]) == 0
    recipe = read_recipe(file, {}, "train sft", PreferenceRecipe if scenario in {"dpo", "kto"} else Recipe)
    assert recipe.datasets
    assert set(tomllib.loads(file.read_text())) <= set(type(recipe).model_fields)
    assert main(["train", "init", scenario, "--output", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_jobs_resume_goes_on_with_an_interrupted_run(typed, tmp_path, capsys, monkeypatch) -> None:
    from calpaca_trainer.causal_trainer import CausalTrainer

    step = CausalTrainer.training_step

    def interrupted(self, *arguments, **options):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    output = tmp_path / "run"
    options = ["--max-steps", "4", "--save-every", "2", "--samples", "0", "--dtype", "float32", "--output", str(output)]
    with monkeypatch.context() as interrupting:
        interrupting.setattr(CausalTrainer, "training_step", interrupted)
        assert main(["train", "sft", *typed, *options]) == 130
    capsys.readouterr()
    assert main(["jobs", "list", "--json"]) == 0
    (job,) = json.loads(capsys.readouterr().out)
    assert (job["state"], job["done"], job["total"]) == ("cancelled", 3, 4)
    assert main(["jobs", "resume", job["id"]]) == 0
    result = capsys.readouterr()
    assert result.out == f"{output}\n"
    assert "Going on after step 2 of 4." in result.err
