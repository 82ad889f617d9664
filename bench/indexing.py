"""Indexing throughput against calling the embedding model directly.

    python bench/indexing.py [--rounds 5] [--chunks 384]

Both sides embed the same chunks with the default embedder in batches of its own size, in one process, taking turns; each
round has texts of its own, so that the ledger knows none. The direct side gets the chunks ready-made and sorted by length;
the index also reads, splits, records in the ledger, and stores. Prints chunks per second and the median of the rounds'
ratios.
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


def main(rounds: int, chunks: int) -> None:
    from calpaca import runtime

    embedder = runtime().embedder("multilingual-e5-small")
    embedder.embed_documents(["warm up"] * embedder.batch_size)
    ratios = []
    for number in range(rounds):
        direct, count = measure_direct(embedder, text(chunks, 2 * number))
        indexed, indexed_count = measure_index(embedder, text(chunks, 2 * number + 1))
        ratios.append(indexed / direct)
        print(
            f"direct {direct:6.2f} chunks/s ({count})   index {indexed:6.2f} chunks/s ({indexed_count})   {ratios[-1]:.3f}"
        )
    print(f"median ratio {statistics.median(ratios):.3f}")


def measure_direct(embedder, content: str) -> tuple[float, int]:
    from langchain_core.documents import Document

    from calpaca.documents.splitter import SentenceSplitter

    chunks = SentenceSplitter(embedder.count_tokens).split_documents([Document(content)])
    chunks.sort(key=lambda chunk: chunk.metadata["tokens"], reverse=True)
    started = time.perf_counter()
    for start in range(0, len(chunks), embedder.batch_size):
        embedder.embed_documents([chunk.page_content for chunk in chunks[start : start + embedder.batch_size]])
    return len(chunks) / (time.perf_counter() - started), len(chunks)


def measure_index(embedder, content: str) -> tuple[float, int]:
    from calpaca import runtime
    from calpaca.documents.index import DocumentIndex

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text.txt")
        file.write_text(content, encoding="utf-8")
        index = DocumentIndex([file], embedder, runtime().loaders, runtime().stores.get("faiss"))
        started = time.perf_counter()
        for _ in index.sync(lambda: runtime().jobs.start("bench", "Index", {"file": str(file)})):
            pass
        return len(index) / (time.perf_counter() - started), len(index)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=384)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as data:
        os.environ["CALPACA_DATA"] = data
        main(arguments.rounds, arguments.chunks)
