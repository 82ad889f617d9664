"""How well retrieval_qa tells questions that the documents answer from those they do not.

    python bench/evidence.py [--ranking] [../shared/data]

With `--ranking`, how well the paragraph that answers each question of XQuAD (English, Chinese, and across) and of CMRC's
trial set (Chinese) is found among all of its set, with the default embedder (dense), with words (BM25), and with both
(hybrid): the share whose paragraph comes first (R@1), is among the first five (R@5), and the mean of 1 / rank (MRR).

Without it: for each XQuAD question (English and Chinese) the paragraphs of its own article hold the answer; those of
another article, and those of all others together, do not. Prints, on the half of the articles that no threshold was
chosen on, the share of questions that are refused wrongly and rightly, with the default embedder's rule and with the
words alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
from langchain_core.documents import Document

from calpaca import runtime
from calpaca.core.events import Source
from calpaca.documents import keywords
from calpaca.documents.hybrid import fuse
from calpaca.documents.splitter import SentenceSplitter
from calpaca_retrieval_qa.evidence import E5_RULE, EvidenceRule

K = 4
FETCHED = 50


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranking", action="store_true")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("../shared/data"))
    arguments = parser.parse_args()
    embedder = runtime().embedder(E5_RULE.embedder)
    texts = {language: load(arguments.folder / f"xquad_{language}_first24.json") for language in ("en", "zh")}
    if arguments.ranking:
        ranking(embedder, texts | {"cmrc": load(arguments.folder / "cmrc2018_trial.json")})
    else:
        refusals(embedder, texts)


def ranking(embedder, texts: dict[str, list[dict]]) -> None:
    paragraphs = {name: [p for article in articles for p in article["paragraphs"]] for name, articles in texts.items()}
    vectors = {name: embedder.embed_documents([p["context"] for p in each]) for name, each in paragraphs.items()}
    print(f"{'questions':<12} {'paragraphs':<12} {'search':<8} R@1    R@5    MRR")
    for asked, read in (("en", "en"), ("zh", "zh"), ("cmrc", "cmrc"), ("en", "zh"), ("zh", "en")):
        owners = [number for number, p in enumerate(paragraphs[asked]) for _ in p["qas"]]
        questions = [qa["question"] for p in paragraphs[asked] for qa in p["qas"]]
        queries = np.stack([embedder.embed_query(question) for question in questions])
        dense = np.argsort(-(queries @ vectors[read].T), axis=1)[:, :FETCHED]  # [questions, paragraphs]
        words = by_words([p["context"] for p in paragraphs[read]], questions)
        both = [fuse([list(near), shared]) for near, shared in zip(dense.tolist(), words, strict=True)]
        for name, orders in (("dense", dense.tolist()), ("BM25", words), ("hybrid", both)):
            ranks = np.array(
                [order.index(own) + 1 if own in order else np.inf for order, own in zip(orders, owners, strict=True)]
            )
            figures = f"{(ranks == 1).mean():.3f}  {(ranks <= 5).mean():.3f}  {(1 / ranks).mean():.3f}"
            print(f"{asked:<12} {read:<12} {name:<8} {figures}  of {len(ranks)} in {len(vectors[read])}")


def by_words(texts: list[str], questions: list[str]) -> list[list[int]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(keywords.SCHEMA)
        keywords.write(connection, dict(enumerate(texts)))
        return [keywords.best(connection, question, FETCHED) for question in questions]


def refusals(embedder, texts: dict[str, list[dict]]) -> None:
    print(f"{'questions':<12} {'documents':<14} {'rule':<14} refused")
    for language, other in (("en", "en"), ("zh", "zh"), ("en", "zh"), ("zh", "en")):
        measure(embedder, texts[language], texts[other], f"{language} on {other}")


def load(file: Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8"))["data"]


def measure(embedder, asked: list[dict], read: list[dict], label: str) -> None:
    splitter = SentenceSplitter(embedder.count_tokens)
    chunks = [
        (number, chunk.page_content)
        for number, article in enumerate(read)
        for chunk in splitter.split_documents(Document(p["context"]) for p in article["paragraphs"])
    ]
    owner = np.array([number for number, _ in chunks])
    vectors = embedder.embed_documents([text for _, text in chunks])
    pick = random.Random(0)
    refused: dict[tuple[str, str], list[bool]] = {}
    for number, article in list(enumerate(asked))[len(asked) // 2 :]:
        for question in (qa["question"] for p in article["paragraphs"] for qa in p["qas"]):
            scores = vectors @ embedder.embed_query(question)
            another = pick.choice([n for n in range(len(read)) if n != number])
            places = {"its own": owner == number, "another": owner == another, "all others": owner != number}
            for name, mask in places.items():
                best = np.flatnonzero(mask)[np.argsort(-scores[mask])[:K]]
                passages = [Source("", chunks[i][1], score=float(scores[i])) for i in best]
                for rule_name, rule in (("score + words", E5_RULE), ("words", EvidenceRule())):
                    verdict = rule.judge(question, passages)
                    refused.setdefault((name, rule_name), []).append(not verdict.supported)
    for (name, rule_name), values in sorted(refused.items(), key=lambda item: item[0][1]):
        print(f"{label:<12} {name:<14} {rule_name:<14} {np.mean(values):.3f}  of {len(values)}")


if __name__ == "__main__":
    main()
