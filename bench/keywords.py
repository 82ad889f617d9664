"""Keyword search over a million chunks: milliseconds per question, and what the FTS5 table takes on disk.

    python bench/keywords.py [--count 1000000] [--questions 200] [--folder FOLDER]

Chunks of 70 words whose frequencies fall like 1 / rank over 200,000 words (Zipf's law, as in any language), and as many
Chinese ones of 150 characters over 5,000. A question has four to twelve words of a chunk, without the 60 most common ones,
which a list of stop words takes away. Times are of the whole search in the manifest, ids included: with all words of the
questions, and as it is, with the most common ones left out. Agreement is the share of the first ten of the one that are
among the first ten of the other.
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
import time
from pathlib import Path

import numpy as np

from calpaca.documents import keywords
from calpaca.documents.manifest import Manifest

BLOCK = 10_000


def zipf(draw: np.random.Generator, words: int):
    """A function that draws `size` ranks, each as often as 1 / (rank + 2.7) says (Mandelbrot's form of Zipf's law)."""
    cumulated = np.cumsum(1.0 / (np.arange(1, words + 1) + 2.7))
    cumulated /= cumulated[-1]
    return lambda size: np.searchsorted(cumulated, draw.random(size))


def spelt(rank: int) -> str:
    """A word of letters for a rank, so that no stemmer makes two of them one."""
    letters = "bcdfghjklmnpqrtvwxz"
    word = ""
    while rank or not word:
        rank, digit = divmod(rank, len(letters))
        word += letters[digit]
    return f"q{word}q"


COMMON = {spelt(rank) for rank in range(60)}


def texts(count: int, chinese: bool, draw: np.random.Generator):
    """Blocks of chunks, as lists of words or characters."""
    ranks = zipf(draw, 5_000 if chinese else 200_000)
    name = (lambda rank: chr(0x4E00 + rank)) if chinese else spelt
    known = np.array([name(rank) for rank in range(5_000 if chinese else 200_000)])
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        yield known[ranks((size, 150 if chinese else 70))]


def fill(manifest: Manifest, count: int, chinese: bool, draw: np.random.Generator) -> list[str]:
    """Write the chunks and draw questions from some of them."""
    questions, number = [], 0
    gap = "" if chinese else " "
    for block in texts(count, chinese, draw):
        with manifest._connection() as connection:
            rows = [(number + place, f"id{number + place}", f"file{number // 100}.txt") for place in range(len(block))]
            connection.executemany("INSERT INTO chunks (number, id, path) VALUES (?, ?, ?)", rows)
            keywords.write(connection, {number + place: gap.join(words) for place, words in enumerate(block)})
        number += len(block)
        for words in block[draw.choice(len(block), 8)]:
            start, size = draw.integers(0, len(words) - 12), draw.integers(4, 13)
            chosen = [word for word in words[start : start + size] if chinese or word not in COMMON]
            questions.append(gap.join(chosen or words[:1]))
    return questions


def measured(manifest: Manifest, questions: list[str], most: int, name: str) -> list[list[str]]:
    """The first ten chunks of each question, when so many texts may be scored."""
    keywords.MOST_TEXTS, usual = most, keywords.MOST_TEXTS
    times, found = [], []
    for question in questions:
        started, cpu = time.perf_counter(), time.process_time()
        found.append(list(manifest.search(question, 50))[:10])
        times.append((1000 * (time.perf_counter() - started), 1000 * (time.process_time() - cpu)))
    keywords.MOST_TEXTS = usual
    middle, high, worst = np.percentile([wall for wall, _ in times], [50, 95, 100])
    busy = np.percentile([cpu for _, cpu in times], 95)
    print(
        f"  {name}: median {middle:.1f} ms, 95 % {high:.1f} ms ({busy:.1f} of CPU), longest {worst:.1f} ms", flush=True
    )
    return found


def main(count: int, asked: int, folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name, chinese in (("words", False), ("Chinese", True)):
        started = time.process_time()
        manifest = Manifest(folder / f"{name}.sqlite")
        questions = fill(manifest, count, chinese, draw)
        written, size = time.process_time() - started, manifest.path.stat().st_size >> 20
        print(f"{name}: {count:,} chunks, written in {written:.0f} s of CPU, {size:,} MiB", flush=True)
        chosen = [questions[place] for place in draw.choice(len(questions), min(asked, len(questions)), replace=False)]
        everything = measured(manifest, chosen, count, "all words")
        rarest = measured(manifest, chosen, keywords.MOST_TEXTS, "as it is")
        agreed = [
            len(set(some) & set(every)) / max(len(every), 1) for some, every in zip(rarest, everything, strict=True)
        ]
        print(f"  agreement of the first ten: {np.mean(agreed):.3f}", flush=True)
    print(f"SQLite {sqlite3.sqlite_version}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="Kept; without it a temporary one.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = arguments.folder or Path(temporary)
        where.mkdir(parents=True, exist_ok=True)
        main(arguments.count, arguments.questions, where)
