"""The whole path on real weights: rows by a local model, filtered, checked, and trained on; pages indexed and trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from calpaca.cli.main import program


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(program, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.mark.slow
def test_rows_of_a_local_model_are_checked_and_trained_on(smollm2, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("crawl", "instructions", "rows.jsonl", "--max-rows", "2", "--max-new-tokens", "140", "--seed", "1")
    report = json.loads(Path("rows.report.json").read_text())
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert (len(rows), report["rows"], report["stopped"]) == (2, 2, "max_rows")
    assert all(row["instruction"] and row["output"] for row in rows)
    rejected = Path("rows.rejected.jsonl").read_text().splitlines()
    assert sum(report["rejected"].values()) == len(rejected)

    checked = run("train", "data", "check", "--dataset", "rows.jsonl", "--model", "smollm2-135m-instruct")
    assert "2 rows of Alpaca, 2 examples" in checked.output

    run(
        "train", "sft", "--dataset", "rows.jsonl", "--model", "smollm2-135m-instruct", "--max-length", "256",
        "--max-steps", "2", "--batch-size", "1", "--samples", "0", "--output", "adapter",
    )  # fmt: skip
    assert list(Path("adapter").rglob("adapter_model.safetensors"))


@pytest.mark.slow
def test_a_crawled_site_is_asked_about_and_trained_on_as_it_lies(smollm2, e5, trap_site, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with trap_site(("/glaciers", "/gbk", "/violins")) as site:
        run("crawl", "web", site.url, "--allow-network", "127.0.0.0/8", "--delay", "0", "--exclude", "falcons|copy")
        address = f"{site.url}glaciers"
    answer = run(
        "run", "retrieval_qa", "--file", "corpus", "--question", "What do glaciers grind rock into?", "--json",
        "--max-new-tokens", "24", "--temperature", "0",
    )  # fmt: skip
    sources = json.loads(answer.stdout)["sources"]
    assert sources[0]["source"] == address

    checked = run(
        "train", "data", "check", "--stage", "pretrain", "--dataset", "corpus/documents.jsonl", "--max-length", "256",
        "--model", "smollm2-135m-instruct", "--json",
    )  # fmt: skip
    texts = Path("corpus/documents.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(checked.stdout)["examples"] >= len(texts) >= 3  # a long text makes several
    run(
        "train", "pretrain", "--dataset", "corpus/documents.jsonl", "--model", "smollm2-135m-instruct", "--max-length", "128",
        "--max-steps", "2", "--batch-size", "1", "--samples", "0", "--output", "adapter",
    )  # fmt: skip
    assert list(Path("adapter").rglob("adapter_model.safetensors"))
