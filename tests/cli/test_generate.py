"""`calpaca generate` on real weights."""

import json
import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest

MODEL = ("--model", "smollm2-135m-instruct", "--dtype", "float32")
QUESTIONS = ["What is the capital of France?", "Name a colour.", "What is 2 + 2?"]


@pytest.fixture
def ask(calpaca, smollm2, tmp_path, monkeypatch):
    """`ask("--prompt", "…")` runs `calpaca generate` with the small model and a ledger of its own."""
    monkeypatch.setenv("CALPACA_DATA", str(tmp_path / "data"))
    return lambda *arguments: calpaca("generate", *MODEL, "--max-new-tokens", "8", *arguments)


@pytest.fixture
def questions(tmp_path) -> Path:
    file = tmp_path / "questions.txt"
    file.write_text("\n".join(QUESTIONS), encoding="utf-8")
    return file


def test_one_instruction_is_answered_on_stdout(ask):
    result = ask("--prompt", QUESTIONS[0])
    assert (result.code, result.out) == (0, "The capital of France is Paris.\n")
    assert ask("--prompt", QUESTIONS[0], "--json").json["finish_reason"] == "stop"


def test_without_the_template_a_text_is_continued_as_it_stands(ask):
    continued = ask("--prompt", "The llama lives in the mountains of", "--no-with-prompt").out
    assert continued == " the town of Elmira, a\n"


def test_a_file_is_answered_row_by_row_and_again_without_the_model(ask, questions, tmp_path):
    printed = ask("--data-file", str(questions))
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["input"] for row in rows] == QUESTIONS
    assert rows[0]["answer"] == "The capital of France is Paris."
    assert [row["finish_reason"] for row in rows].count("length") == 2
    assert (
        "3 rows, 0 of them answered before, 2 cut at their longest length (--max-new-tokens); 24 tokens" in printed.err
    )
    written = ask("--data-file", str(questions), "--output", "answers.jsonl")
    assert written.out == "answers.jsonl\n"
    assert "3 rows, 3 of them answered before" in written.err
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8") == printed.out
    refused = ask("--data-file", str(questions), "--output", "answers.jsonl")
    assert (refused.code, "--overwrite" in refused.err) == (2, True)


def test_the_seed_form_brings_its_generation_config(ask, questions, tmp_path):
    result = ask("--data-file", str(questions), "--output", "predictions.json", "--format", "seed", "--json")
    assert (result.json["output"], result.json["rows"], result.json["failed"]) == ("predictions.json", 3, 0)
    pairs = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert pairs[0]["Output"] == "The capital of France is Paris."
    assert pairs[0]["Input"].endswith(f"{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n")
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 8


def test_a_row_that_fails_is_told_in_its_place_and_by_the_exit_code(ask, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "long " * 9000}) + "\n" + json.dumps({"prompt": QUESTIONS[0]}))
    result = ask("--data-file", str(file), "--output", "answers.jsonl")
    assert result.code == 1
    assert "1 of 2 rows failed" in result.err
    bad, good = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert "the context holds 8192" in bad["error"]
    assert good["answer"] == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Give --prompt or --data-file"),
        (("--prompt", "a", "--data-file", "b.txt"), "Give --prompt or --data-file"),
        (("--prompt", "a", "--output", "b.txt"), "belong to a data file"),
        (("--data-file", "missing.txt"), "missing.txt cannot be read: No such file"),
        (("--data-file", "missing.txt", "--format", "seed"), "Name it with --output"),
        (("--prompt", "a", "--in-flight", "0"), "--in-flight is 0"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(ask, arguments, said):
    result = ask(*arguments)
    assert (result.code, result.out) == (2, "")
    assert said in result.err


def test_a_file_in_no_known_encoding_is_refused_and_one_in_gbk_is_read(ask, tmp_path):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    assert "binary file" in ask("--data-file", "binary.txt").err
    (tmp_path / "gbk.txt").write_bytes("为什么要减少污染，保护环境？\n请介绍一下羊驼。".encode("gbk"))
    rows = ask("--data-file", "gbk.txt").out.splitlines()
    assert json.loads(rows[1])["input"] == "请介绍一下羊驼。"


def test_lines_come_through_a_pipe(start, smollm2, tmp_path):
    process = start(
        "generate", *MODEL, "--max-new-tokens", "8", "--data-file", "-", CALPACA_DATA=str(tmp_path / "data")
    )
    out, err = process.communicate(QUESTIONS[0], timeout=120)
    assert json.loads(out)["answer"] == "The capital of France is Paris.", err


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(start, smollm2, tmp_path):
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    (tmp_path / "many.txt").write_text("\n".join(f"Tell me about the number {number}." for number in range(12)))

    def run(output: str, data: str):
        return start(
            "generate", *MODEL, "--max-new-tokens", "12", "--temperature", "0.8", "--in-flight", "4",
            "--data-file", "many.txt", "--output", output, CALPACA_DATA=str(tmp_path / data),
        )  # fmt: skip

    undisturbed = run("whole.jsonl", "undisturbed")
    undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0
    finished = 0
    for _ in range(2):
        process = run("killed.jsonl", "killed")
        wanted = finished + chance.randint(1, 4)
        while process.poll() is None and (now := _recorded(tmp_path / "killed" / "jobs.sqlite")) < wanted:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert now >= finished
        finished = _recorded(tmp_path / "killed" / "jobs.sqlite")
        assert not (tmp_path / "killed.jsonl").exists()
    last = run("killed.jsonl", "killed")
    _, err = last.communicate(timeout=300)
    assert f"12 rows, {finished} of them answered before" in err
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def _recorded(ledger: Path) -> int:
    if not ledger.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True) as connection:
            return connection.execute("SELECT COUNT(*) FROM steps").fetchone()[0]
    except sqlite3.OperationalError:  # its tables are not made yet
        return 0
