"""A million vectors in the FAISS store: seconds to prepare, milliseconds per question, recall, memory.

    python bench/vectors.py [--count 1000000] [--questions 500] [--folder FOLDER]

Vectors of 384 numbers that lie as an embedding model's do: in clusters of different sizes within clusters, around a
common direction (mean cosine of two of them about 0.75, as with multilingual-e5-small). A question is a vector's
neighbour, about 0.9 from it. Recall is the share of the 10 nearest by exact comparison that the store finds among its
first 10. Times are of the whole search, documents included; memory is what the process holds and does not share with the
file cache (RssAnon).
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
from langchain_core.embeddings import Embeddings

from calpaca.documents.stores.faiss import FILE, FaissStore

DIMENSIONS = 384
BLOCK = 20_000


class NoEmbeddings(Embeddings):
    """Everything here is searched by vector."""

    def embed_documents(self, texts):
        raise NotImplementedError

    embed_query = embed_documents


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Cloud:
    """Points of topics within subjects, whose sizes fall like 1 / rank."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        common = self.noise(1) * 1.7
        subjects = common + self.noise(200) * 0.6
        self.topics = np.repeat(subjects, 50, axis=0) + self.noise(10_000) * 0.5
        sizes = 1.0 / np.arange(1, 10_001)
        self.shares = self.draw.permutation(sizes / sizes.sum())

    def noise(self, count: int):
        return self.draw.standard_normal((count, DIMENSIONS)) / DIMENSIONS**0.5

    def points(self, count: int):
        return unit(self.topics[self.draw.choice(len(self.topics), count, p=self.shares)] + self.noise(count) * 0.6)


def blocks(count: int) -> Iterator[np.ndarray]:
    cloud = Cloud(0)
    for start in range(0, count, BLOCK):
        yield cloud.points(min(BLOCK, count - start))


def fill(store: FaissStore, count: int) -> None:
    """As `add_texts` writes, in larger transactions."""
    number = len(store)
    if number >= count:
        return
    for vectors in blocks(count):
        with store._transaction() as connection:
            for vector in vectors:
                number += 1
                place = json.dumps({"source": f"file{number // 100}.txt", "index": number % 100})
                row = (number, f"id{number}", f"Text of chunk {number}. " * 12, place)
                connection.execute("INSERT INTO documents VALUES (?, ?, ?, ?)", row)
                connection.execute("INSERT INTO vectors VALUES (?, ?)", (number, vector.tobytes()))


def exact(questions, count: int, k: int):
    """Numbers of the nearest vectors, in blocks."""
    best_scores = np.full((len(questions), k), -2.0, np.float32)
    best = np.zeros((len(questions), k), np.int64)
    for start, vectors in zip(range(0, count, BLOCK), blocks(count), strict=True):
        flat = faiss.IndexFlatIP(DIMENSIONS)
        flat.add(vectors)
        scores, positions = flat.search(questions, k)
        scores, positions = np.hstack([best_scores, scores]), np.hstack([best, positions + start + 1])
        order = np.argsort(-scores, axis=1)[:, :k]
        best_scores, best = np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1)
    return best


def main(count: int, questions: int, folder: Path) -> None:
    started = time.perf_counter()
    store = FaissStore(NoEmbeddings(), folder / FILE)
    fill(store, count)
    print(f"{count:,} vectors in {folder}, written in {time.perf_counter() - started:.0f} s", flush=True)
    started, cpu = time.perf_counter(), time.process_time()
    store.prepare()
    print(f"prepared in {time.perf_counter() - started:.0f} s ({time.process_time() - cpu:.0f} s of CPU)", flush=True)
    store.close()
    store = FaissStore(NoEmbeddings(), folder / FILE)
    started = time.perf_counter()
    store.prepare()
    print(f"opened again in {1000 * (time.perf_counter() - started):.0f} ms")
    draw = np.random.default_rng(1)
    near = next(blocks(count))[draw.choice(min(BLOCK, count), questions)]
    asked = unit(near + draw.standard_normal(near.shape).astype(np.float32) / DIMENSIONS**0.5 * 0.45)
    times, found = [], []
    for question in asked:
        started = time.perf_counter()
        documents = store.similarity_search_with_score_by_vector(question, 10)
        times.append(1000 * (time.perf_counter() - started))
        found.append({int(document.id[2:]) for document, _ in documents})
    status = Path("/proc/self/status").read_text()
    anonymous = int(status.split("RssAnon:")[1].split()[0]) >> 10
    truth = exact(asked, count, 10)
    recall = np.mean([len(each & set(own.tolist())) / 10 for each, own in zip(found, truth, strict=True)])
    middle, high, worst = np.percentile(times, [50, 95, 100])
    print(f"question: median {middle:.1f} ms, 95 % {high:.1f} ms, longest {worst:.1f} ms; recall@10 {recall:.3f}")
    sizes = ", ".join(f"{file.name} {file.stat().st_size >> 20:,} MiB" for file in sorted(folder.iterdir()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"memory {anonymous:,} MiB while searching (peak with preparing {peak:,} MiB); on disk: {sizes}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="Kept; without it a temporary one.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        main(arguments.count, arguments.questions, folder)
