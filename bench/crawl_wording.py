"""How well near-duplicates are told from similar questions: the labelled edits of plugins/crawl/tests/test_wording.py, counted.

    python bench/crawl_wording.py [--rows alpaca_zh.json]

Beside them the rule of ROUGE-L alone, as Self-Instruct has it. With --rows the texts are the instructions of an Alpaca file
instead of the questions of ../shared/data. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from random import Random
from typing import Any

from calpaca.core.near_duplicates import NearDuplicates
from calpaca.core.text_measures import words
from calpaca_crawl.wording import same_content

_FILE = Path(__file__).parents[1] / "plugins" / "crawl" / "tests" / "test_wording.py"
_spec = importlib.util.spec_from_file_location("wording", _FILE)
assert _spec is not None and _spec.loader is not None
edits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(edits)
SAME = (edits.polite, edits.particles, edits.other_words, edits.slip, edits.punctuation)


def counted(texts: list[str], content: bool) -> dict[str, Any]:
    """Shares of the edits that are dropped: of those that ask for the same, all; of the others, none is right."""
    chance, pool = Random(9), NearDuplicates(says_the_same=same_content if content else None)
    known = [text for text in texts if pool.add(text) is None]
    recall = {edit.__name__: [pool.find(edit(text, chance)) is not None for text in known] for edit in SAME}
    right = [pool.find(chance.choice(SAME)(text, chance)) is not None for text in known]
    others = [edits._other(text, chance.choice(known), chance) for text in known]
    wrong = [pool.find(other) is not None for other in others]
    return {
        "texts": len(known),
        "recall": round(sum(right) / len(right), 3),
        "precision": round(sum(right) / (sum(right) + sum(wrong)), 3),
        "recall_of_each": {name: round(sum(found) / len(found), 3) for name, found in recall.items()},
    }


def neighbours(texts: list[str]) -> dict[str, int]:
    """Pairs of different real texts that ROUGE-L takes for near-duplicates, and how many of them say the same to us."""
    alike = edits.neighbours(texts)
    return {"pairs": len(alike), "dropped": sum(same_content(*pair) for pair in alike)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path)
    file = parser.parse_args().rows
    if file is None:
        texts = edits.real_texts()
    else:
        rows = json.loads(file.read_text("utf-8"))
        found = dict.fromkeys("\n".join(filter(None, [row["instruction"], row.get("input")])) for row in rows)
        texts = [text for text in found if 10 <= len(words(text)) <= 200]
    print(json.dumps({
        "by_content": counted(texts, content=True), "rouge_l_alone": counted(texts, content=False),
        "real_neighbours": neighbours(texts),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
