"""BM25 over the words of texts, in an FTS5 table of SQLite (https://sqlite.org/fts5.html).

English words are reduced to their stems (Porter). Chinese and Japanese, which put no spaces between words, are cut into
overlapping pairs of characters: they find the right paragraph more often than the words of the dictionary jieba do
(docs/quality.md).
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence

SCHEMA = "CREATE VIRTUAL TABLE IF NOT EXISTS keywords USING fts5 (terms, tokenize = 'porter unicode61');"

_RUN = re.compile(r"(?P<unspaced>[\u3040-\u30ff\u3400-\u9fff]+)|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
"""A run of Han characters or kana, or a word of a script with spaces."""

_STOP = frozenset(
    [
        *("what", "which", "who", "whom", "whose", "when", "where", "why", "how", "did", "does", "do", "is", "are"),
        *("was", "were", "be", "been", "being", "has", "have", "had", "can", "could", "will", "would", "should", "may"),
        *("the", "a", "an", "of", "in", "on", "at", "to", "for", "from", "by", "with", "and", "or", "not", "no", "as"),
        *("that", "this", "these", "those", "it", "its", "there", "than", "their", "they", "he", "she", "his", "her"),
        *("you", "your", "we", "our", "i", "my", "me", "about", "into"),
    ]
)
"""Words of a question that say nothing about where its answer stands."""

_HIGHEST = 2.2
"""k1 + 1 of FTS5's BM25 (k1 = 1.2): what a term's weight is multiplied by at most."""

MOST_TEXTS = 100_000
"""Texts that are scored for a question. In a larger table its most common terms, which tell least, are left out until no
more than so many hold one: FTS5 scores each text that holds any (docs/performance.md has the times)."""

_PAIR = 0.5
"""Pairs of characters overlap: about every second one straddles two words and stands nowhere."""


def terms(text: str) -> list[str]:
    """What a text is looked up by."""
    found: list[str] = []
    for match in _RUN.finditer(text):
        run = match.group()
        if match["unspaced"] and len(run) > 1:
            found += [run[start : start + 2] for start in range(len(run) - 1)]
        else:
            found.append(run)
    return found


def query_terms(question: str) -> list[str]:
    """What a question is looked up by: its terms, each once, without stop words unless there is nothing else."""
    found = list(dict.fromkeys(terms(question)))
    return [term for term in found if term.lower() not in _STOP] or found


def write(connection: sqlite3.Connection, texts: Mapping[int, str]) -> None:
    """Put texts into the table by number, in place of those that it has under the same numbers."""
    rows = [(number, " ".join(terms(text))) for number, text in texts.items()]
    connection.executemany("INSERT OR REPLACE INTO keywords (rowid, terms) VALUES (?, ?)", rows)


def delete(connection: sqlite3.Connection, numbers: Iterable[int]) -> None:
    """Take texts out of the table."""
    connection.executemany("DELETE FROM keywords WHERE rowid = ?", [(number,) for number in numbers])


def best(
    connection: sqlite3.Connection, question: str, k: int, among: str = "", parameters: Sequence[object] = ()
) -> list[tuple[int, float]]:
    """(number, share) of the `k` texts that share most with the question, the best first; those that share nothing are
    not among them.

    The share is the BM25 score divided by the highest that the terms in use can reach (pairs of characters are counted
    half there): about 0.45 for a text of usual length that holds each term once. It is low when most of the question stands
    nowhere, as when it is asked in another language. `among` is SQL for the numbers to choose from, with its
    `parameters`.
    """
    texts = _texts(connection)
    wanted = _telling(connection, query_terms(question), texts)
    if not wanted:
        return []
    highest = _highest(wanted, texts)
    within = f"AND rowid IN ({among})" if among else ""
    rows = connection.execute(
        f"SELECT rowid, rank FROM keywords WHERE keywords MATCH ? {within} ORDER BY rank LIMIT ?",  # noqa: S608  # SQL of our own
        (" OR ".join(map(_quoted, wanted)), *parameters, k),
    )
    return [(number, -rank / highest) for number, rank in rows]


def _telling(connection: sqlite3.Connection, wanted: Sequence[str], texts: int) -> dict[str, int]:
    """Terms to look up, with the number of texts that hold each: all, or the rarest ones that `MOST_TEXTS` allows."""
    count = "SELECT count(*) FROM (SELECT 1 FROM keywords WHERE keywords MATCH ? LIMIT ?)"  # no more are walked through
    held = {term: connection.execute(count, (_quoted(term), MOST_TEXTS + 1)).fetchone()[0] for term in wanted}
    if texts <= MOST_TEXTS:
        return held
    chosen: dict[str, int] = {}
    for term in sorted(held, key=lambda term: held[term]):
        if chosen and sum(chosen.values()) + held[term] > MOST_TEXTS:
            break
        chosen[term] = held[term]
    return chosen


def _texts(connection: sqlite3.Connection) -> int:
    """Texts in the table; of a large one, whose counting takes time, its highest number, which may be a little more."""
    (highest,) = connection.execute("SELECT max(id) FROM keywords_docsize").fetchone()
    if (highest or 0) > MOST_TEXTS:
        return int(highest)
    return int(connection.execute("SELECT count(*) FROM keywords_docsize").fetchone()[0])


def _highest(wanted: Mapping[str, int], texts: int) -> float:
    """BM25 of a text that holds nothing but these terms, as FTS5 weighs them."""
    weights = 0.0
    for term, holding in wanted.items():
        weight = max(1e-6, math.log((texts - holding + 0.5) / (holding + 0.5)))
        weights += weight * (_PAIR if len(term) == 2 and _RUN.match(term)["unspaced"] else 1.0)  # type: ignore[index]  # a term is a run
    return weights * _HIGHEST


def _quoted(term: str) -> str:
    return f'"{term}"'
