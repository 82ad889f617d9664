"""BM25 over the words of texts, in an FTS5 table of SQLite (https://sqlite.org/fts5.html).

English words are reduced to their stems (Porter). Chinese and Japanese, which put no spaces between words, are cut into
overlapping pairs of characters: on the Chinese questions of `bench/evidence.py --ranking` the right paragraph then comes
first for 0.948 (XQuAD) and 0.979 (CMRC) of them, with the words of the dictionary jieba for 0.941 and 0.963.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Mapping

SCHEMA = "CREATE VIRTUAL TABLE IF NOT EXISTS keywords USING fts5 (terms, tokenize = 'porter unicode61');"

_RUN = re.compile(r"(?P<unspaced>[\u3040-\u30ff\u3400-\u9fff]+)|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
"""A run of Han characters or kana, or a word of a script with spaces."""


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


def write(connection: sqlite3.Connection, texts: Mapping[int, str]) -> None:
    """Put texts into the table by number, in place of those that it has under the same numbers."""
    rows = [(number, " ".join(terms(text))) for number, text in texts.items()]
    connection.executemany("INSERT OR REPLACE INTO keywords (rowid, terms) VALUES (?, ?)", rows)


def delete(connection: sqlite3.Connection, numbers: Iterable[int]) -> None:
    """Take texts out of the table."""
    connection.executemany("DELETE FROM keywords WHERE rowid = ?", [(number,) for number in numbers])


def best(connection: sqlite3.Connection, question: str, k: int) -> list[int]:
    """Numbers of the `k` texts that share most with the question, the best first; those that share nothing are not among
    them."""
    query = " OR ".join(f'"{term}"' for term in dict.fromkeys(terms(question)))
    if not query:
        return []
    rows = connection.execute("SELECT rowid FROM keywords WHERE keywords MATCH ? ORDER BY rank LIMIT ?", (query, k))
    return [number for (number,) in rows]
