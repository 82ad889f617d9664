"""Rows of instruction data: requests, replies, budgets, resuming and giving up, with the shipped fake model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from calpaca.cli.main import program
from calpaca.core.errors import JobError, ModelError, UsageError
from calpaca.testing import fake_runtime

WORDS = [
    "river",
    "mountain",
    "engine",
    "violin",
    "orchard",
    "planet",
    "lantern",
    "harbour",
    "carpet",
    "melon",
    "thunder",
    "pencil",
    "copper",
    "falcon",
    "saddle",
]


def reply(rows: list[dict[str, str]]) -> str:
    return json.dumps({"rows": rows})


class Writer:
    """A model that writes another row each time it is asked, as far as its prompt tells them apart."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, prompt: str) -> str:
        self.asked += 1
        first, second = (WORDS[(self.asked * step + start) % len(WORDS)] for step, start in ((1, 0), (7, 3)))
        question = f"{first} {self.asked} {second} {self.asked * 31} why {first}{second}"
        return reply([{"instruction": question, "input": "", "output": f"Because of {second}, number {self.asked}."}])


@pytest.fixture
def crawl(monkeypatch, tmp_path) -> Callable[..., Result]:
    """Runs `calpaca crawl instructions` with a fake model that gives `answers`."""
    monkeypatch.chdir(tmp_path)

    def run(answers, *arguments: str) -> Result:
        monkeypatch.setattr(
            "calpaca_crawl.commands.instructions.shared_runtime", lambda: fake_runtime(answers, by="character")
        )
        return CliRunner().invoke(
            program, ["crawl", "instructions", *arguments, "--no-constrained", "--records", "1"], catch_exceptions=True
        )

    return run


def rows(name: str = "rows.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def report(name: str = "rows.report.json") -> dict:
    return json.loads(Path(name).read_text(encoding="utf-8"))


def test_the_run_ends_after_as_many_rows_as_are_wanted(crawl) -> None:
    result = crawl(Writer(), "rows.jsonl", "--max-rows", "3")
    assert result.exit_code == 0, result.output
    assert len(rows()) == 3
    assert {"instruction", "input", "output", "provenance"} == rows()[0].keys()
    assert rows()[0]["provenance"]["topic"] in report()["topics"]
    assert report()["stopped"] == "max_rows"
    assert Path("rows.report.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_repeats_itself_is_heated_and_then_given_up_with_its_row_kept(crawl) -> None:
    result = crawl([reply([{"instruction": "Name a river.", "input": "", "output": "The Rhine."}])], "rows.jsonl")
    assert isinstance(result.exception, JobError)
    assert "no new row" in result.exception.message
    assert "'duplicate'" in result.exception.message
    assert len(rows()) == 1
    assert report()["heated"] == 3
    assert len(rows("rows.rejected.jsonl")) == report()["rejected"]["duplicate"]


def test_replies_that_are_no_json_or_broken_are_repaired_or_kept_with_their_reason(crawl) -> None:
    whole = {"instruction": "Name a river in Asia.", "input": "", "output": "The Yangtze."}
    answers = [
        "I will not write JSON.",
        "Here you are:\n```json\n[" + json.dumps(whole) + ",]\n```",
        '{"rows": [{"instruction": "Name a mountain", "output": "K2"',
    ]
    crawl(answers, "rows.jsonl", "--max-rows", "2")
    assert [row["output"] for row in rows()] == ["The Yangtze.", "K2"]
    assert report()["rejected"]["no_json"] >= 1
    assert rows("rows.rejected.jsonl")[0]["record"] == "I will not write JSON."


def test_tokens_never_exceed_their_limit(crawl) -> None:
    crawl(Writer(), "rows.jsonl", "--max-tokens", "6000", "--max-new-tokens", "300")
    done = report()
    assert done["stopped"] == "max_tokens"
    assert 0 < done["prompt_tokens"] + done["completion_tokens"] <= 6000
    assert rows()


def test_the_cost_never_exceeds_its_limit(crawl) -> None:
    crawl(
        Writer(), "rows.jsonl", "--max-cost", "0.02", "--price-in", "2", "--price-out", "6", "--max-new-tokens", "300"
    )
    assert report()["stopped"] == "max_cost"
    assert 0 < report()["cost"] <= 0.02


def test_time_that_is_over_ends_the_run_with_what_there_is(crawl) -> None:
    result = crawl(Writer(), "rows.jsonl", "--max-time", "0.000001")
    assert result.exit_code == 0, result.output
    assert report()["stopped"] == "max_time"
    assert rows() == []


def test_more_rows_continue_the_run_and_ask_for_nothing_again(crawl) -> None:
    crawl(Writer(), "rows.jsonl", "--max-rows", "3", "--in-flight", "1")
    first = rows()
    more = Writer()
    more.asked = 3
    crawl(more, "rows.jsonl", "--max-rows", "5", "--in-flight", "1")
    assert rows()[:3] == first
    assert len(rows()) == 5
    assert report()["reused_replies"] == 3
    assert more.asked == 5


def test_the_output_of_another_run_is_not_replaced_unasked(crawl) -> None:
    Path("rows.jsonl").write_text("mine\n")
    result = crawl(Writer(), "rows.jsonl", "--max-rows", "2")
    assert isinstance(result.exception, UsageError)
    assert Path("rows.jsonl").read_text() == "mine\n"
    assert crawl(Writer(), "rows.jsonl", "--max-rows", "2", "--overwrite").exit_code == 0
    assert isinstance(crawl(Writer(), "rows.jsonl", "--max-rows", "2", "--seed", "7").exception, UsageError)


def test_an_engine_that_fails_time_after_time_ends_the_run_and_keeps_its_rows(crawl) -> None:
    writer = Writer()

    def answers(prompt: str) -> str | Exception:
        return writer(prompt) if writer.asked < 2 else ModelError("The server is gone.", "Start it.")

    result = crawl(answers, "rows.jsonl", "--in-flight", "1")
    assert isinstance(result.exception, JobError)
    assert "The server is gone." in result.exception.message
    assert len(rows()) == 2
    assert report()["failed_requests"] == {"ModelError": 5}


def test_questions_on_documents_carry_the_place_of_what_they_quote(crawl) -> None:
    text = "The dome was opened in 1987. It has a clock of copper."
    Path("dome.txt").write_text(text)
    answer = reply([
        {"question": "When was the dome opened?", "quote": "opened in 1987", "answer": "In 1987."},
        {"question": "Who built it?", "quote": "built by Ada", "answer": "Ada."},
    ])  # fmt: skip
    crawl([answer], "rows.jsonl", "--method", "documents", "--document", "dome.txt")
    (row,) = rows()
    place = row["provenance"]
    assert text[place["start"] : place["end"]] == "opened in 1987"
    assert place["source"].endswith("dome.txt")
    assert report()["rejected"] == {"quote_not_found": 1}
    assert report()["stopped"] == "all_asked"


def test_given_instructions_are_answered(crawl) -> None:
    Path("asked.txt").write_text("Name a colour.\nName a metal.\n")
    crawl(
        lambda prompt: "Copper" if "metal" in prompt else "Green",
        "rows.jsonl",
        "--method",
        "answers",
        "--data-file",
        "asked.txt",
    )
    assert [(row["instruction"], row["output"]) for row in rows()] == [
        ("Name a colour.", "Green"),
        ("Name a metal.", "Copper"),
    ]


def test_dialogues_are_written_in_the_forms_of_trainers(crawl) -> None:
    turns = [
        {"user": "What is a falcon?", "assistant": "A bird."},
        {"user": "Does it hunt?", "assistant": "Yes, other birds."},
    ]
    answer = json.dumps({"turns": turns})
    crawl([answer], "a.jsonl", "--method", "dialogues", "--max-rows", "1")
    crawl([answer], "s.jsonl", "--method", "dialogues", "--max-rows", "1", "--form", "sharegpt")
    crawl([answer], "m.jsonl", "--method", "dialogues", "--max-rows", "1", "--form", "messages")
    assert rows("a.jsonl")[0]["history"] == [["What is a falcon?", "A bird."]]
    assert rows("s.jsonl")[0]["conversations"][1] == {"from": "gpt", "value": "A bird."}
    assert [each["role"] for each in rows("m.jsonl")[0]["messages"]] == ["user", "assistant"] * 2


def test_bootstrapping_and_evolution_name_the_rows_they_come_from(crawl) -> None:
    crawl(
        Writer(),
        "rows.jsonl",
        "--method",
        "self_instruct",
        "--method",
        "evolve",
        "--max-rows",
        "12",
        "--in-flight",
        "2",
    )
    own = {row["provenance"]["id"] for row in rows()}
    parents = [set(row["provenance"]["parents"]) for row in rows()]
    assert all(parents)
    assert any(own & each for each in parents)
    assert report()["methods"].keys() == {"self_instruct", "evolve"}


def test_a_prompt_file_of_ones_own_is_used_and_its_mistakes_are_named(crawl) -> None:
    assert crawl([""], "--write-prompts", "own").exit_code == 0
    Path("own/topics.md").write_text("Ask about $subject. $format")
    result = crawl(Writer(), "rows.jsonl", "--prompts", "own")
    assert isinstance(result.exception, UsageError)
    assert "subject" in result.exception.message


def test_rows_with_a_low_score_are_left_out_and_a_score_is_asked_for_once(crawl) -> None:
    writer, scored = Writer(), []

    def answers(prompt: str) -> str:
        if "as training data" not in prompt:
            return writer(prompt)
        scored.append(prompt)
        return '{"score": 2}' if len(scored) % 2 else "Score: 5"

    options = ("rows.jsonl", "--score", "fake", "--min-score", "4", "--in-flight", "1")
    crawl(answers, *options, "--max-rows", "2")
    assert [row["provenance"]["score"] for row in rows()] == [5, 5]
    assert report()["rejected"] == {"low_score": 2}
    assert {each["record"]["score"] for each in rows("rows.rejected.jsonl")} == {2}
    assert report()["scores"] == {"5": 2}
    crawl(answers, *options, "--max-rows", "3")
    assert len(rows()) == 3
    assert len(scored) == 6


def test_a_row_that_gets_no_score_is_left_out(crawl) -> None:
    writer = Writer()
    crawl(
        lambda prompt: "I cannot say." if "as training data" in prompt else writer(prompt),
        "rows.jsonl", "--score", "fake", "--max-tokens", "6000", "--max-new-tokens", "300", "--in-flight", "1",
    )  # fmt: skip
    assert rows() == []
    assert set(report()["rejected"]) == {"not_scored"}
