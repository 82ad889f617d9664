"""lm-eval: scores over HTTP are those of the same weights under lm-eval's own `hf` model.

Its `local-completions` sends token ids with `echo` and `logprobs` and reads the log probabilities of the prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: make check-api")

XQUAD = Path(__file__).parents[5] / "shared/data/xquad_en_first24.json"

pytestmark = pytest.mark.filterwarnings("default")  # lm-eval and datasets warn of their own

CHOICE = {
    "task": "calpaca_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}

ROLLING = {
    "task": "calpaca_rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[dict[str, Any]]:
    """Two tasks: questions with three answers of their paragraph to choose from, and short paragraphs to predict."""
    if not XQUAD.is_file():
        pytest.skip(f"XQuAD is not at {XQUAD}")
    paragraphs = [each for article in json.loads(XQUAD.read_text())["data"] for each in article["paragraphs"]]
    questions = []
    for number, paragraph in enumerate(paragraphs[:16]):
        answers = list(dict.fromkeys(qa["answers"][0]["text"] for qa in paragraph["qas"][:3]))
        asked = paragraph["qas"][number % len(answers)]
        answer = answers.index(asked["answers"][0]["text"])
        questions.append({"question": asked["question"], "choices": answers, "answer": answer})
    texts = sorted((paragraph["context"] for paragraph in paragraphs), key=len)[:3]
    folder = tmp_path_factory.mktemp("tasks")
    rows = {"choice": questions, "rolling": [{"text": text} for text in texts]}
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return [
        {
            **task,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / f"{name}.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
        }
        for name, task in (("choice", CHOICE), ("rolling", ROLLING))
    ]


def evaluate(tasks: list[dict[str, Any]], kind: str, **arguments: object) -> dict[str, Any]:
    """lm-eval's report, with the log likelihood that each request got."""
    from lm_eval import simple_evaluate

    report = simple_evaluate(
        model=kind, model_args=arguments, tasks=tasks, device="cpu", batch_size=4, bootstrap_iters=0
    )
    assert report is not None
    return report


def scores(report: dict[str, Any]) -> dict[str, float]:
    """Every metric by task and name."""
    return {
        f"{task} {name}": value
        for task, values in report["results"].items()
        for name, value in values.items()
        if "," in name and "stderr" not in name
    }


def choices(report: dict[str, Any]) -> list[tuple[float, bool]]:
    """The log likelihood of each choice, and whether the model would have written it."""
    return [tuple(answer[0]) for sample in report["samples"]["calpaca_choice"] for answer in sample["resps"]]


@pytest.mark.parametrize("served", ["base", "adapter"])
def test_scores_over_http_are_those_of_the_weights(target, tasks, served):
    over_http = evaluate(
        tasks, "local-completions", base_url=f"{target.url}/completions", model=target.names[served],
        tokenizer=str(target.weights), tokenizer_backend="huggingface", tokenized_requests=True, max_length=1024,
    )  # fmt: skip
    adapter = {"peft": str(target.adapter)} if served == "adapter" else {}
    of_weights = evaluate(tasks, "hf", pretrained=str(target.weights), dtype="float32", max_length=1024, **adapter)
    for (ours, would_write), (theirs, really) in zip(choices(over_http), choices(of_weights), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)
        assert would_write == really
    assert scores(over_http) == pytest.approx(scores(of_weights), rel=1e-4)
