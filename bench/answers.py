"""How well retrieval_qa answers: right answers, verified citations and refusals, for one or several models.

    python bench/answers.py [--language en] [--questions 24] [--model NAME …] [--compare CHANGES …] [../shared/data]

Documents are the paragraphs of six XQuAD articles (a file each), the questions those about them, and as many about six
other articles, which these documents do not answer; thresholds were chosen on other articles than these twelve. Writes
documents and set into a folder of the cache, runs `calpaca run retrieval_qa --evaluate` on them for each model, and
prints the table of docs/quality.md. What was answered once is not asked again. Half an hour on one core for 24 questions
of each kind and one model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from calpaca import runtime
from calpaca.core.events import Progress
from calpaca.core.paths import cache_dir
from calpaca_retrieval_qa.app import build
from calpaca_retrieval_qa.evalset import write_evalset
from calpaca_retrieval_qa.options import RetrievalQAOptions
from calpaca_retrieval_qa.scores import Scores

ARTICLES = slice(12, 18)
OTHERS = slice(18, 24)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--language", choices=["en", "zh"], default="en")
    parser.add_argument("--questions", type=int, default=24, help="of each kind")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--compare", action="append", default=[])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("../shared/data"))
    arguments = parser.parse_args()
    articles = json.loads((arguments.folder / f"xquad_{arguments.language}_first24.json").read_text("utf-8"))["data"]
    place = cache_dir() / "bench-answers" / arguments.language
    documents = write_documents(place / "documents", articles[ARTICLES])
    evalset = place / f"{arguments.questions}.jsonl"
    answerable = spread(list(rows(articles[ARTICLES])), arguments.questions)
    others = spread([{"question": row["question"]} for row in rows(articles[OTHERS])], arguments.questions)
    write_evalset(evalset, [*answerable, *others])
    columns: dict[str, dict] = {}
    for model in arguments.model or ["smollm2-135m-instruct"]:
        found = evaluate(documents, evalset, model, arguments.compare)
        columns |= {f"{Path(model).name}, {name}": scores for name, scores in found.items()}
    print(markdown(columns))


def write_documents(folder: Path, articles: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, article in enumerate(articles):
        text = "\n\n".join(paragraph["context"] for paragraph in article["paragraphs"])
        (folder / f"article_{number:02}.txt").write_text(text, encoding="utf-8")
    return folder


def rows(articles: list[dict]) -> Iterator[dict]:
    """Lines of an evaluation set."""
    for number, article in enumerate(articles):
        base = 0
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                first = qa["answers"][0]
                start = base + first["answer_start"]
                yield {
                    "question": qa["question"],
                    "answers": [answer["text"] for answer in qa["answers"]],
                    "source": f"article_{number:02}.txt",
                    "start": start,
                    "end": start + len(first["text"]),
                }
            base += len(paragraph["context"]) + 2


def spread(found: list[dict], count: int) -> list[dict]:
    """At most `count` of them, at equal distances."""
    return [found[position * len(found) // count] for position in range(min(count, len(found)))]


def evaluate(documents: Path, evalset: Path, model: str, compare: list[str]) -> dict[str, dict]:
    options = RetrievalQAOptions(
        files=[documents], evaluate=evalset, model=model, device="cpu", max_new_tokens=48, parallel=8, compare=compare
    )
    value: dict = {}
    done = 0
    for event in build(options, runtime()).events():
        if isinstance(event, Progress) and event.unit == "questions" and event.done > done:
            done = event.done
            print(f"{event.what}: {done} of {event.total} questions", file=sys.stderr)
        value = getattr(event, "value", value)
    return value["configurations"]


def markdown(columns: dict[str, dict]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for field in fields(Scores):
        values = (scores[field.name] for scores in columns.values())
        cells = ("–" if value is None else f"{value:.3f}".rstrip("0").rstrip(".") for value in values)
        lines.append(f"| {field.name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
