"""The gate: statistics, leakage, the name in the settings, and the command on a small real model."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from calpaca.cli.main import main
from calpaca.core.errors import UsageError
from calpaca.core.settings import read_settings
from calpaca.core.spec import AdapterSpec, ModelSpec
from calpaca.plugins import wiring
from calpaca_trainer.errors import DataError
from calpaca_trainer.held_out import read_held_out
from calpaca_trainer.leakage import find_leaks, training_files
from calpaca_trainer.named_model import register, section
from calpaca_trainer.paired import compare

# Statistics ---------------------------------------------------------------------------------------------------------


def test_right_and_wrong_are_compared_by_mcnemar_s_exact_test() -> None:
    """Ten questions differ, nine for the candidate: (C(10,9) + C(10,10)) / 2^10."""
    test = compare([1] * 9 + [0] + [1] * 20, [0] * 9 + [1] + [1] * 20)
    assert (test.test, test.won, test.lost) == ("McNemar, exact", 9, 1)
    assert test.p == pytest.approx(11 / 1024)
    assert test.is_better(0.05)


def test_scores_are_compared_by_signed_ranks() -> None:
    """All of six better: 1 / 2^6, the least that six pairs can give; Siegel's table has it."""
    test = compare([0.2, 0.4, 0.6, 0.8, 0.9, 0.95], [0.1, 0.2, 0.3, 0.4, 0.41, 0.42])
    assert test.test == "Wilcoxon signed-rank"
    assert test.p == pytest.approx(1 / 64)
    assert 0 < test.low < test.difference < test.high


def test_no_difference_or_one_by_chance_does_not_win() -> None:
    assert compare([0.5] * 40, [0.5] * 40).p == 1.0
    assert compare([1.0] * 40, [1.0] * 40).p == 1.0
    chance = np.random.default_rng(3)
    noise = [compare(chance.random(50).tolist(), chance.random(50).tolist()).is_better(0.05) for _ in range(5)]
    assert sum(noise) <= 1


def test_scores_that_do_not_pair_up_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 scores cannot be paired with 2"):
        compare([1, 2, 3], [1, 2])


# Leakage ------------------------------------------------------------------------------------------------------------


def write(file: Path, *rows: dict) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def test_questions_that_were_trained_on_are_found(tmp_path: Path) -> None:
    trained = write(
        tmp_path / "trained.jsonl",
        {"instruction": "Who keeps the key of the old observatory on the hill?", "output": "Mr Hall."},
        {"instruction": "这座天文台的圆顶是哪一年重新建造的？", "output": "1979 年。"},
    )
    preferred = write(
        tmp_path / "preferred.jsonl", {"prompt": "How many steps has it?", "chosen": "9.", "rejected": "8."}
    )
    (tmp_path / "book.txt").write_text("It is asked: When was\nthe dome opened? In 1979.", "utf-8")
    asked = write(
        tmp_path / "asked.jsonl",
        {"prompt": "who keeps the key of the old observatory on the hill", "completion": "Mr Hall."},
        {"prompt": "Who keeps the keys of the old observatory on the hill?", "completion": "Mr Hall."},
        {"prompt": "这座天文台的圆顶是哪一年重新建的？", "completion": "1979 年。"},
        {"prompt": "When was the dome opened?", "completion": "In 1979."},
        {"prompt": "How many steps has it?", "completion": "9."},
        {"prompt": "What is seen through the small telescope?", "completion": "Saturn."},
    )
    questions, _ = read_held_out((asked,))
    leaks = find_leaks(questions, [trained, preferred, tmp_path / "book.txt"])
    assert [str(leak).removeprefix(f"{tmp_path}/").replace(f"{tmp_path}/", "") for leak in leaks] == [
        "asked.jsonl:1: is trained.jsonl:1",
        "asked.jsonl:2: is 91% like trained.jsonl:1",
        "asked.jsonl:3: is 97% like trained.jsonl:2",
        "asked.jsonl:4: is book.txt:1",
        "asked.jsonl:5: is preferred.jsonl:1",
    ]


def test_near_duplicates_within_the_training_data_hide_nothing(tmp_path: Path) -> None:
    """The pool keeps both: a question like the second alone is found."""
    trained = write(
        tmp_path / "trained.jsonl",
        {"prompt": "one two three four five six seven eight nine ten", "completion": "a"},
        {"prompt": "one two three four five six seven xx yy zz", "completion": "a"},
    )
    asked = write(tmp_path / "asked.jsonl", {"prompt": "three four five six seven xx yy zz", "completion": "a"})
    (leak,) = find_leaks(read_held_out((asked,))[0], [trained])
    assert leak.trained.endswith(":2")


def test_an_adapter_that_does_not_say_what_it_learnt_is_in_doubt(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not say what it was trained on") as caught:
        training_files(tmp_path)
    assert "--trained-on" in caught.value.hint


# The name -----------------------------------------------------------------------------------------------------------


def test_a_name_is_appended_and_all_else_stays(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "calpaca.toml"
    file.write_text('# mine\nmodel = "x"  # a comment', "utf-8")
    (tmp_path / "run").mkdir()
    spec = ModelSpec(model="base", adapters=(AdapterSpec(source="run", scale=0.5),), chat_template="alpaca")
    register("tuned", spec, file)
    text = file.read_text("utf-8")
    assert text.startswith('# mine\nmodel = "x"  # a comment\n\n[models.tuned]\n')
    named = read_settings().models["tuned"]
    assert named.adapters == (AdapterSpec(source=str(tmp_path / "run"), scale=0.5),)
    assert (named.model, named.chat_template) == ("base", "alpaca")
    with pytest.raises(UsageError, match="names a model 'tuned' already"):
        register("tuned", spec, file)
    with pytest.raises(UsageError, match=r"--name is 'a\.b'"):
        register("a.b", spec, file)
    file.write_text("no = [toml", "utf-8")
    with pytest.raises(UsageError, match="cannot be read"):
        register("other", spec, file)


def test_a_section_says_what_differs_from_the_defaults() -> None:
    assert tomllib.loads(section("a", ModelSpec(model="m", trust_remote_code=True))) == {
        "models": {"a": {"model": "m", "trust_remote_code": True}}
    }


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def typed(small, monkeypatch, tmp_path) -> Iterator[list[str]]:
    """The command on a model of two layers. The program has a runtime and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calpaca.toml").write_text("", "utf-8")
    monkeypatch.setattr(wiring, "_shared", None)
    yield ["train", "gate", "--model", str(small), "--dtype", "float32", "--measure", "likelihood"]
    wiring.runtime().close()


def numbers(*wanted: int) -> list[dict]:
    return [{"instruction": f"What is {n} plus {n}?", "output": f"It is {2 * n}. So it is!"} for n in wanted]


@pytest.mark.slow
def test_an_adapter_that_wins_gets_its_name_and_one_that_does_not_gets_none(typed, run, tmp_path, capsys) -> None:
    trained = write(tmp_path / "trained.jsonl", *numbers(*range(0, 60, 2)))
    folder = run(datasets=[str(trained)], max_steps=8, learning_rate=5e-3)
    asked = write(tmp_path / "asked.jsonl", *numbers(*range(1, 20, 2)), numbers(4)[0])
    typed += ["--adapter", str(folder), "--least", "8", "--similarity", "0.99", "--name", "sums"]
    assert main([*typed, "--dataset", str(asked), "--output", "answers.jsonl"]) == 0
    told = capsys.readouterr()
    assert "--model sums is in" in told.out
    assert f"left out, trained on: {asked}:11: is {trained}:3" in told.err
    assert read_settings().models["sums"].adapters[0].source == str(folder)
    rows = [json.loads(line) for line in Path("answers.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 10
    assert all(row["adapter"]["score"] > row["base"]["score"] for row in rows)
    assert main([*typed, "--dataset", str(asked)]) == 2  # the name is taken
    capsys.readouterr()

    typed[-1] = "luck"
    assert main([*typed, "--dataset", str(asked), "--level", "0.0005", "--json"]) == 1
    told = capsys.readouterr().out
    facts = json.loads(told[told.index("{") :])
    assert (facts["wins"], facts["registered"], facts["trained_on"]) == (False, None, 1)
    assert facts["comparisons"]["base"]["p"] == pytest.approx(1 / 1024)

    trained.write_text(trained.read_text() + trained.read_text())
    assert main([*typed, "--dataset", str(asked)]) == 1
    assert "no longer what it was" in capsys.readouterr().err
    assert set(read_settings().models) == {"sums"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Name a run folder with --adapter"),
        (["--adapter", "a"], "--dataset"),
        (["--adapter", "a", "--dataset", "b", "--app", "retrieval_qa"], "An app gives no likelihoods"),
        (["--adapter", "a", "--dataset", "b", "--file", "c"], "--file is for an app"),
        (["--adapter", "a", "--name", "a b"], "--name is 'a b'"),
    ],
    ids=["adapter", "data", "app", "file", "name"],
)
def test_what_cannot_be_judged_is_refused(arguments, told, typed, capsys) -> None:
    assert main([*typed, *arguments]) == 2
    assert told in capsys.readouterr().err


def test_too_few_questions_leave_a_doubt(typed, tmp_path, capsys) -> None:
    asked = write(tmp_path / "asked.jsonl", *numbers(1, 2, 3))
    trained = write(tmp_path / "trained.jsonl", *numbers(1))
    options = ["--adapter", "a", "--dataset", str(asked), "--trained-on", str(trained)]
    assert main([*typed, *options]) == 1
    assert "There are 2 questions to judge by, fewer than --least 30: 3 were read, 1 of them" in capsys.readouterr().err


@pytest.mark.slow
def test_answers_of_a_base_an_adapter_and_an_app_are_compared(smollm2, tmp_path, monkeypatch, capsys) -> None:
    """retrieval_qa knows what stands in the document, an adapter that learnt something else does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wiring, "_shared", None)
    (tmp_path / "notes.md").write_text("The dome was opened in 1979. Mr Hall keeps the key. The hill is 212 m high.\n")
    trained = write(tmp_path / "trained.jsonl", *numbers(*range(8)))
    train = ["train", "sft", "--model", str(smollm2), "--dataset", str(trained), "--max-steps", "1", "--samples", "0"]
    assert main([*train, "--max-length", "64", "--output", "run"]) == 0
    asked = write(
        tmp_path / "asked.jsonl",
        *({"prompt": text, "completion": wanted} for text, wanted in [
            ("When was the dome opened?", "1979"), ("Who keeps the key?", "Mr Hall"), ("How high is the hill?", "212 m"),
            ("What was opened in 1979?", "The dome"), ("What does Mr Hall keep?", "the key"),
        ]),
    )  # fmt: skip
    options = ["--adapter", "run", "--dataset", str(asked), "--least", "5", "--max-new-tokens", "24", "--name", "bad"]
    app = ["--app", "retrieval_qa", "--file", "notes.md", "--json"]
    assert main(["train", "gate", "--model", str(smollm2), *options, *app]) == 1
    told = capsys.readouterr().out
    facts = json.loads(told[told.index("{") :])
    assert facts["comparisons"].keys() == {"base", "retrieval_qa"}
    assert facts["comparisons"]["retrieval_qa"]["rival"] > facts["comparisons"]["base"]["rival"]
    assert (facts["wins"], facts["registered"]) == (False, None)
    wiring.runtime().close()
