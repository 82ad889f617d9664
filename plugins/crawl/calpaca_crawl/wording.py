"""Whether two questions that look alike ask for the same thing in other words, or for another thing in the same words.

"哪年建成了北京的车站" and "哪年建成了上海的车站" share nine tenths of their characters and have nothing to do with each
other; "请问北京车站是在哪一年建成的呢" is the first one again. So what differs is looked at: politeness, particles and
words that stand for one another (wording.txt) are wording; a name, a number, a negation or any other word is content.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files

from rapidfuzz.distance import Levenshtein

from calpaca.core.text_measures import words

_LONG = 80
"""Words from which on a text is as good as the same when few of them differ: an input may hold a whole passage."""
_FEW = 0.05
_TYPO = 10
"""Words of a text in which one Chinese character more or less is a slip."""
_PER_SLIP = 20
"""Words of a longer text to each slip."""
_ENDING = re.compile(r"(?:'s|s|es|ed|d|ing|ly)$")
_NEGATION = frozenset("不没无非未别莫勿") | {"not", "no", "never", "without", "except"}
_MARK = " "


def same_content(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two texts, cut by `calpaca.core.text_measures.words`, differ in wording alone."""
    if _is_slip(list(_changes(one, other)), max(len(one), len(other))):
        return True
    first, second = _content(one), _content(other)
    changes = [change for change in _changes(first, second) if not _is_wording(*change)]
    if not changes:
        return True
    longest = max(len(first), len(second))
    return _is_slip(changes, longest) or (longest >= _LONG and _are_few(changes, longest))


def _content(text: Sequence[str]) -> list[str]:
    """The words without what may be left out, each in the form that stands for its like; all of it where none is left."""
    kept = _wording().sub(lambda found: _forms()[found[0]], f"{_MARK}{_MARK.join(text)}{_MARK}").split()
    return kept or list(text)


def _changes(one: Sequence[str], other: Sequence[str]) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    for change in Levenshtein.opcodes(one, other):
        if change.tag != "equal":
            yield one[change.src_start : change.src_end], other[change.dest_start : change.dest_end]


def _is_wording(old: Sequence[str], new: Sequence[str]) -> bool:
    """Words that differ in their ending alone, and in no number."""
    return len(old) == len(new) and all(_stem(each) == _stem(its) for each, its in zip(old, new, strict=True))


def _stem(word: str) -> str:
    return _ENDING.sub("", word) if len(word) > 4 and word.isascii() and word.isalpha() else word


def _is_slip(changes: Sequence[tuple[Sequence[str], Sequence[str]]], longest: int) -> bool:
    """A Chinese character more or less in a text of some length, or in a long one some of them, each by itself."""
    odd = [word for old, new in changes for word in (*old, *new)]
    if longest < _TYPO or len(odd) > max(longest // _PER_SLIP, 1) or len(odd) > len(changes):
        return False
    return not any(word.isascii() or word in _NEGATION for word in odd)


def _are_few(changes: Sequence[tuple[Sequence[str], Sequence[str]]], longest: int) -> bool:
    """Next to nothing of a long text, and no number: a sum with other numbers is another one."""
    changed = [word for old, new in changes for word in (*old, *new)]
    amount = sum(max(len(old), len(new)) for old, new in changes)
    return amount <= _FEW * longest and not any(character.isdigit() for word in changed for character in word)


@cache
def _forms() -> dict[str, str]:
    """What each entry of wording.txt becomes, both as words with a blank before and without one after."""
    forms: dict[str, str] = {}
    for line in (files("calpaca_crawl") / "wording.txt").read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        entries = [_MARK.join(words(entry)) for entry in line.split("|")]
        for entry in filter(None, entries):
            forms[_MARK + entry] = entries[0] and _MARK + entries[0]
    return forms


@cache
def _wording() -> re.Pattern[str]:
    longest_first = sorted(_forms(), key=len, reverse=True)
    return re.compile("(?:" + "|".join(map(re.escape, longest_first)) + f")(?={_MARK})")
