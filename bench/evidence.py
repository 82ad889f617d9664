"""How well passages are found, and questions told apart that the documents answer from those they do not.

    python bench/evidence.py [--ranking [--rerank ms-marco-minilm-l-12 [--languages en zh]]] [../shared/data]

With `--ranking`, how well the paragraph that answers each question of XQuAD (English, Chinese, and across) and of CMRC's
trial set (Chinese) is found among all of its set: the share whose paragraph comes first (R@1), is among the first five
(R@5), and the mean of 1 / rank (MRR). Each paragraph is a file of an index as retrieval_qa makes it, with the default
embedder and chunk size, and each way of searching is asked for the 50 best chunks; a paragraph's rank is that of its
best chunk. With `--rerank` only hybrid search with sentences, before and after a reranker has ordered the 20 best chunks
anew, and the processor time that this takes for a question.

Without it: for each XQuAD question (English and Chinese) the paragraphs of its own article hold the answer; those of
another article, and those of all others together, do not. Prints, on the half of the articles that no threshold was
chosen on, the share of questions that are refused wrongly and rightly, with the default embedder's rule and with the
words alone, when the passages are looked for by meaning alone and by hybrid search.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from calpaca import runtime
from calpaca.core.events import Source
from calpaca.core.reranker import Reranker
from calpaca.documents.index import DocumentIndex
from calpaca.documents.retrieval import reranked, retrieve
from calpaca.documents.search import ChunkFilter, Search
from calpaca_retrieval_qa.evidence import E5_RULE, EvidenceRule

K = 4
FETCHED = 50
KINDS = ("similarity", "keywords", "rrf", "hybrid")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranking", action="store_true")
    parser.add_argument("--rerank", metavar="MODEL")
    parser.add_argument("--languages", nargs="+", choices=("en", "zh"), default=("en", "zh"))
    parser.add_argument("folder", nargs="?", type=Path, default=Path("../shared/data"))
    arguments = parser.parse_args()
    embedder = runtime().embedder(E5_RULE.embedder)
    texts = {language: load(arguments.folder / f"xquad_{language}_first24.json") for language in ("en", "zh")}
    reranker = runtime().reranker(arguments.rerank) if arguments.rerank else None
    with tempfile.TemporaryDirectory() as cache:  # the models come from the ordinary one
        os.environ["CALPACA_CACHE"] = os.environ["CALPACA_DATA"] = cache
        if reranker is not None:
            reranking(embedder, {language: texts[language] for language in arguments.languages}, reranker)
        elif arguments.ranking:
            ranking(embedder, texts | {"cmrc": load(arguments.folder / "cmrc2018_trial.json")})
        else:
            refusals(embedder, texts)


def load(file: Path) -> list[dict]:
    return json.loads(file.read_text(encoding="utf-8"))["data"]


@contextmanager
def indexed(embedder, articles: list[dict], **options: bool) -> Iterator[DocumentIndex]:
    """An index with a file `ARTICLE/PARAGRAPH.txt` for each paragraph."""
    with tempfile.TemporaryDirectory() as folder:
        for number, article in enumerate(articles):
            for position, paragraph in enumerate(article["paragraphs"]):
                file = Path(folder, str(number), f"{position}.txt")
                file.parent.mkdir(exist_ok=True)
                file.write_text(paragraph["context"], encoding="utf-8")
        index = DocumentIndex([folder], embedder, runtime().loaders, runtime().stores.get("faiss"), **options)
        for _ in index.sync(lambda: runtime().jobs.start("bench", "Index", {"folder": folder})):
            pass
        yield index


def ranking(embedder, texts: dict[str, list[dict]]) -> None:
    print(f"{'questions':<12} {'paragraphs':<12} {'search':<32} R@1    R@5    MRR")
    for asked, read in (("en", "en"), ("zh", "zh"), ("cmrc", "cmrc"), ("en", "zh"), ("zh", "en")):
        for sentences in (False, True):
            with indexed(embedder, texts[read], sentences=sentences) as index:
                ranks = ranks_by_kind(index, texts[asked], ("hybrid",) if sentences else KINDS)
            for kind, found in ranks.items():
                name = f"{kind}, {'with' if sentences else 'without'} sentences" if kind == "hybrid" else kind
                tell(asked, read, name, found)


def tell(asked: str, read: str, name: str, ranks: list[float]) -> None:
    values = np.array(ranks)
    figures = f"{(values == 1).mean():.3f}  {(values <= 5).mean():.3f}  {(1 / values).mean():.3f}"
    print(f"{asked:<12} {read:<12} {name:<32} {figures}  of {len(values)}", flush=True)


def reranking(embedder, texts: dict[str, list[dict]], reranker: Reranker) -> None:
    for language, articles in texts.items():
        ranks: dict[str, list[float]] = defaultdict(list)
        seconds = 0.0
        with indexed(embedder, articles) as index:
            for question, own in questions(articles):
                before = retrieve(index.retriever, question, Search(FETCHED, "hybrid"), merge=False)
                started = time.process_time()
                after = reranked(before, question, Search(FETCHED), reranker)
                seconds += time.process_time() - started
                ranks["hybrid"].append(rank(before, own))
                ranks[f"hybrid, {reranker.name}"].append(rank(after, own))
        for name, found in ranks.items():
            tell(language, language, name, found)
        print(
            f"{1000 * seconds / len(ranks['hybrid']):.0f} ms of processor time for a question's 20 chunks", flush=True
        )


def questions(asked: list[dict]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each question, and the last two parts of its paragraph's path."""
    for number, article in enumerate(asked):
        for position, paragraph in enumerate(article["paragraphs"]):
            for qa in paragraph["qas"]:
                yield qa["question"], (str(number), f"{position}.txt")


def rank(passages: list[Source], own: tuple[str, str]) -> float:
    """The rank of a question's own paragraph; infinite where it is not among those found."""
    order = list(dict.fromkeys(Path(passage.source).parts[-2:] for passage in passages))
    return order.index(own) + 1 if own in order else np.inf


def ranks_by_kind(index: DocumentIndex, asked: list[dict], kinds: tuple[str, ...]) -> dict[str, list[float]]:
    ranks: dict[str, list[float]] = defaultdict(list)
    for question, own in questions(asked):
        for kind in kinds:
            found = retrieve(index.retriever, question, Search(FETCHED, kind), merge=False)
            ranks[kind].append(rank(found, own))
    return ranks


def refusals(embedder, texts: dict[str, list[dict]]) -> None:
    print(f"{'questions':<12} {'search':<11} {'documents':<11} {'rule':<14} refused")
    for asked, read in (("en", "en"), ("zh", "zh"), ("en", "zh"), ("zh", "en")):
        with indexed(embedder, texts[read]) as index:
            for kind in ("similarity", "hybrid"):
                measure(index, texts[asked], kind, f"{asked} on {read}")


def measure(index: DocumentIndex, asked: list[dict], kind: str, label: str) -> None:
    pick = random.Random(0)
    refused: dict[tuple[str, str], list[bool]] = defaultdict(list)
    numbers = range(len(asked))
    for number in numbers[len(asked) // 2 :]:
        others = [str(n) for n in numbers if n != number]
        for question in (qa["question"] for p in asked[number]["paragraphs"] for qa in p["qas"]):
            places = {"its own": [str(number)], "another": [pick.choice(others)], "all others": others}
            for name, articles in places.items():
                where = ChunkFilter(tuple(f"{article}/*" for article in articles))
                passages = retrieve(index.retriever, question, Search(K, kind, where=where))
                for rule_name, rule in (("score + words", E5_RULE), ("words", EvidenceRule())):
                    refused[name, rule_name].append(not rule.judge(question, passages).supported)
    for (name, rule_name), values in sorted(refused.items(), key=lambda item: item[0][1]):
        print(f"{label:<12} {kind:<11} {name:<11} {rule_name:<14} {np.mean(values):.3f}  of {len(values)}", flush=True)


if __name__ == "__main__":
    main()
