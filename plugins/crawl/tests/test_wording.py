"""Near-duplicates by content, on a labelled set made by editing real Chinese questions and instructions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist

from calpaca.core.near_duplicates import NearDuplicates
from calpaca.core.text_measures import words
from calpaca_crawl.wording import same_content

DATA = Path(__file__).parents[3].parent / "shared" / "data"
_SAID_OTHERWISE = (
    ("为什么", "为何"), ("什么(?![时地样人])", "哪些"), ("如何", "怎样"), ("怎么", "如何"), ("哪一年", "哪年"), ("哪年", "何年"),
    ("谁", "哪位"), ("哪里", "何处"), ("多少", "几"), ("写一", "请创作一"), ("介绍", "讲讲"), ("和", "与"),
    ("位于", "坐落于"), ("是什么", "是啥"),
)  # fmt: skip


def _read(name: str) -> str:
    file = DATA / name
    if not file.is_file():
        pytest.skip("the shared test data (../shared/data) is not here")
    return file.read_text(encoding="utf-8")


def real_texts() -> list[str]:
    """Questions on Chinese texts, and what people asked an assistant; nothing twice."""
    found = [
        qa["question"]
        for name in ("cmrc2018_trial.json", "xquad_zh_first24.json")
        for article in json.loads(_read(name))["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    dialogues = map(json.loads, _read("examples_dialogues.jsonl").splitlines())
    found += [turn["user"].strip() for dialogue in dialogues for turn in dialogue["turns"]]
    return [text for text in dict.fromkeys(found) if 10 <= len(words(text)) <= 200]


@pytest.fixture(scope="module")
def asked() -> list[str]:
    return real_texts()


@pytest.fixture(scope="module")
def pool(asked) -> NearDuplicates:
    """All texts, to be looked for alone."""
    pool = NearDuplicates(says_the_same=same_content)
    for text in asked:
        pool.add(text)
    return pool


# Edits that leave the content alone, and one that does not ----------------------------------------------------------


def polite(text: str, chance: Random) -> str:
    return chance.choice(("请问", "请问一下，", "麻烦告诉我", "你好，请问")) + text


def particles(text: str, _: Random) -> str:
    return re.sub("的", "", text, count=1).rstrip("？?。 ") + "呢？"


def other_words(text: str, _: Random) -> str:
    old, new = next((pair for pair in _SAID_OTHERWISE if re.search(pair[0], text)), ("^", "请"))
    return re.sub(old, new, text, count=1)


def slip(text: str, chance: Random) -> str:
    """One Chinese character left out, which is no negation."""
    places = [
        place for place, letter in enumerate(text) if re.match("[\u4e00-\u9fff]", letter) and letter not in "不无未非"
    ]
    place = chance.choice(places)
    return text[:place] + text[place + 1 :]


def punctuation(text: str, _: Random) -> str:
    return re.sub("[，,]", " ", text).rstrip("？?。！ ") + "?!"


def another_name(text: str, other: str, chance: Random) -> str:
    """A piece of two to four characters from the middle of another text in place of one as long."""
    length = chance.randint(2, 4)
    at, of = chance.randrange(1, len(text) - length), chance.randrange(1, max(len(other) - length, 2))
    return text[:at] + other[of : of + length] + text[at + length :]


def another_number(text: str, chance: Random) -> str:
    return re.sub(r"\d", lambda digit: str((int(digit[0]) + chance.randint(1, 9)) % 10), text, count=1)


@pytest.mark.parametrize("edit", [polite, particles, other_words, slip, punctuation], ids=lambda edit: edit.__name__)
def test_what_asks_for_the_same_is_dropped(asked, pool, edit: Callable[[str, Random], str]) -> None:
    chance = Random(3)
    found = [pool.find(edit(text, chance)) is not None for text in asked[::3]]
    assert sum(found) / len(found) >= 0.95


def test_real_questions_that_share_most_words_are_kept(asked) -> None:
    """Pairs that people asked about different things; ROUGE-L alone takes each of them for a near-duplicate."""
    alike = neighbours(asked)
    assert len(alike) >= 100
    assert sum(same_content(*pair) for pair in alike) <= 0.05 * len(alike)


def test_a_changed_name_or_number_is_another_question(asked) -> None:
    chance = Random(5)
    numbers = [(text, another_number(text, chance)) for text in asked if re.search(r"\d", text)]
    names = [(text, another_name(text, chance.choice(asked), chance)) for text in asked]
    pairs = [(words(old), words(new)) for old, new in numbers + names if words(old) != words(new)]
    wrong = sum(same_content(*pair) for pair in pairs)
    assert wrong <= 0.05 * len(pairs)


def test_precision_and_recall_over_all_edits(asked, pool) -> None:
    """As many edits that ask for the same as for something else."""
    chance = Random(9)
    edits = (polite, particles, other_words, slip, punctuation)
    right = [pool.find(chance.choice(edits)(text, chance)) is not None for text in asked]
    others = [_other(text, chance.choice(asked), chance) for text in asked]
    wrong = [pool.find(other) is not None for other in others]
    assert sum(right) / len(right) >= 0.95, "recall"
    assert sum(right) / (sum(right) + sum(wrong)) >= 0.95, "precision"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("请介绍一下北京大学的历史", "介绍北京大学的历史。", True),
        ("请介绍一下北京大学的历史", "请介绍一下南京大学的历史", False),
        ("请写一首关于春天的诗", "写一首关于秋天的诗", False),
        ("这种药可以在饭后服用吗", "这种药不可以在饭后服用吗", False),
        ("How do I bake bread?", "Could you please tell me how to bake bread?", True),
        ("How do I bake bread without yeast?", "How do I bake bread with yeast?", False),
        ("Name three rivers in Germany.", "List three rivers in Germany", True),
        ("Name three rivers in Germany.", "Name three rivers in France.", False),
        ("What is 17 plus 25?", "What is 17 plus 26?", False),
        ("Describe the colour of a ripe banana", "Describe the colours of ripe bananas", True),
    ],
)
def test_wording_and_content_are_told_apart(one, other, same) -> None:
    assert same_content(words(one), words(other)) is same
    assert same_content(words(other), words(one)) is same


def neighbours(texts: list[str]) -> list[tuple[list[str], list[str]]]:
    """All pairs with a ROUGE-L of 0.7 or more, cut into words. It is the normalised Indel similarity of the words."""
    cut = [words(text) for text in texts]
    letters: dict[str, str] = {}
    spelt = ["".join(letters.setdefault(word, chr(0x100 + len(letters))) for word in each) for each in cut]
    alike = cdist(spelt, spelt, scorer=Indel.normalized_similarity, score_cutoff=0.7)
    return [(cut[one], cut[other]) for one, other in zip(*alike.nonzero(), strict=True) if one < other]


def _other(text: str, donor: str, chance: Random) -> str:
    if re.search(r"\d", text):
        return another_number(text, chance)
    return another_name(text, donor, chance)
