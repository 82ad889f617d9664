"""How long it takes to find the near-duplicates among 100,000 Chinese rows, and how much memory.

    python bench/crawl_duplicates.py [--rows 100000] [--file FILE]

The rows are cut from real Chinese text (a text file given with --file, else the documents of ../shared/data); one in ten
is a copy of an earlier one in which a character is left out. Prints one JSON object; `found` is the share of the copies that were found.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import time
from pathlib import Path
from random import Random

from calpaca.core.near_duplicates import NearDuplicates
from calpaca_crawl.wording import same_content

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def sentences(file: Path | None) -> list[str]:
    if file is not None:
        text = file.read_text(encoding="utf-8")
    else:
        articles = json.loads((DATA / "cmrc2018_trial.json").read_text(encoding="utf-8"))["data"]
        text = "".join(paragraph["context"] for article in articles for paragraph in article["paragraphs"])
    return [part for part in re.split(r"[，。；！？\s]+", text) if 6 <= len(part) <= 30]


def rows(parts: list[str], count: int) -> tuple[list[str], set[int]]:
    """Texts of three clauses drawn by chance, and the numbers of those that are copies of one but for a character."""
    chance, made, copies = Random(1), [], set()
    originals: list[str] = []
    for number in range(count):
        if originals and chance.random() < 0.1:
            text = chance.choice(originals)
            place = chance.choice([found.start() for found in re.finditer("[^\\W\\da-zA-Z不没无非未别]", text)])
            made.append(text[:place] + text[place + 1 :])
            copies.add(number)
        else:
            originals.append("，".join(chance.sample(parts, 3)) + "。")
            made.append(originals[-1])
    return made, copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    made, copies = rows(sentences(options.file), options.rows)
    before, pool, dropped = time.process_time(), NearDuplicates(says_the_same=same_content), set()
    for number, text in enumerate(made):
        if pool.add(text) is not None:
            dropped.add(number)
    print(json.dumps({
        "rows": len(made), "kept": len(pool), "seconds_of_processor": round(time.process_time() - before, 1),
        "megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "found": round(len(copies & dropped) / len(copies), 4), "dropped_beside_copies": len(dropped - copies),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
