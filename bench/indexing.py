"""Indexing throughput against calling the embedding model directly, and the time that an unchanged folder takes.

    python bench/indexing.py [--rounds 5] [--chunks 384] [--no-sentences]
    python bench/indexing.py --unchanged 10000

Both sides embed the same number of texts, chunks and their sentences, with the default embedder in batches of its own
size, in one process, taking turns; each round has texts of its own, so that the ledger knows none. The direct side gets
the texts ready-made and sorted by length; the index also reads, splits, records in the ledger, and stores. Prints texts and
chunks per second and the median of the rounds' ratios. `--unchanged` indexes that many files with a fake embedder and
prints the seconds that it takes to see that none has changed.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

WORDS = [
    "llama",
    "alpaca",
    "hill",
    "dome",
    "lens",
    "night",
    "watch",
    "keeper",
    "lamp",
    "honey",
    "donkey",
    "comet",
    "paper",
    "wind",
    "star",
    "road",
    "mirror",
    "key",
]


def text(chunks: int, seed: int) -> str:
    """Paragraphs of different lengths, about one chunk each."""
    pick = random.Random(seed)
    sentence = lambda: " ".join(pick.choices(WORDS, k=pick.randint(6, 20))).capitalize() + f" {pick.random():.4f}."  # noqa: E731
    return "\n\n".join(" ".join(sentence() for _ in range(pick.randint(4, 7))) for _ in range(chunks))


def main(rounds: int, chunks: int, sentences: bool) -> None:
    from calpaca import runtime

    embedder = runtime().embedder("multilingual-e5-small")
    embedder.embed_documents(["warm up"] * embedder.batch_size)
    ratios = []
    for number in range(rounds):
        direct = measure_direct(embedder, text(chunks, 2 * number), sentences)
        indexed, per_second = measure_index(embedder, text(chunks, 2 * number + 1), sentences)
        ratios.append(indexed / direct)
        print(
            f"direct {direct:6.2f} texts/s   index {indexed:6.2f} texts/s, {per_second:6.2f} chunks/s   {ratios[-1]:.3f}"
        )
    print(f"median ratio {statistics.median(ratios):.3f}")


def measure_direct(embedder, content: str, sentences: bool) -> float:
    from langchain_core.documents import Document

    from calpaca.documents.index import MOST_SENTENCES
    from calpaca.documents.sentences import runs
    from calpaca.documents.splitter import SentenceSplitter

    chunks = [
        each.page_content for each in SentenceSplitter(embedder.count_tokens).split_documents([Document(content)])
    ]
    parts = [part for chunk in chunks for part in runs(chunk, "text", MOST_SENTENCES)] if sentences else []
    texts = sorted({*chunks, *parts}, key=len, reverse=True)
    started = time.perf_counter()
    for start in range(0, len(texts), embedder.batch_size):
        embedder.embed_documents(texts[start : start + embedder.batch_size])
    return len(texts) / (time.perf_counter() - started)


def measure_index(embedder, content: str, sentences: bool) -> tuple[float, float]:
    from calpaca import runtime
    from calpaca.documents.index import DocumentIndex

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text.txt")
        file.write_text(content, encoding="utf-8")
        store = runtime().stores.get("faiss")
        index = DocumentIndex([file], embedder, runtime().loaders, store, sentences=sentences)
        job = runtime().jobs.start("bench", "Index", {"file": str(file)})
        started = time.perf_counter()
        for _ in index.sync(lambda: job):
            pass
        seconds = time.perf_counter() - started
        return job.done / seconds, len(index) / seconds


def unchanged(count: int) -> None:
    from calpaca.documents.index import DocumentIndex
    from calpaca.testing import FakeEmbedder, fake_runtime

    with tempfile.TemporaryDirectory() as folder, fake_runtime(embedder=FakeEmbedder()) as runtime:
        for number in range(count):
            file = Path(folder, str(number // 100), f"{number}.md")
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"# File {number}\n\n" + f"Llama {number} hums at night and eats hay. " * 40)
        for name in ("first", "again", "again"):
            started, cpu = time.perf_counter(), time.process_time()
            index = DocumentIndex([folder], runtime.fake_embedder, runtime.loaders, runtime.stores.get("faiss"))
            for _ in index.sync(lambda: runtime.jobs.start("bench", "Index", {"folder": folder})):
                pass
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            print(f"{name}: {count:,} files, {len(index):,} chunks, {seconds:.2f} s ({cpu:.2f} s of CPU)", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=384)
    parser.add_argument("--no-sentences", action="store_true")
    parser.add_argument("--unchanged", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as data:
        os.environ["CALPACA_DATA"] = data
        if arguments.unchanged:
            os.environ["CALPACA_CACHE"] = data
            unchanged(arguments.unchanged)
        else:
            main(arguments.rounds, arguments.chunks, not arguments.no_sentences)
