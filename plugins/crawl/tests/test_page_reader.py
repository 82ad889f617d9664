"""Pages that are read in other processes."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from calpaca_crawl import page_reader
from calpaca_crawl.page import read_page
from calpaca_crawl.page_reader import PageReader

PAGE = b"<html lang='en'><head><title>Falcons</title></head><body><article><h1>Falcons</h1>" + b"".join(
    b"<p>Falcons hunt small birds above open country, and nest on cliffs and old towers.</p>" for _ in range(3)
)


@pytest.mark.slow
def test_pages_are_read_alike_in_other_processes_also_after_one_was_killed(monkeypatch) -> None:
    monkeypatch.setattr(page_reader, "_FEW", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    url = "http://example.org/falcons"

    async def read() -> list[str]:
        reader = PageReader()
        first = await reader.read(url, PAGE, "utf-8")
        for pid in list(reader._pool._processes):
            os.kill(pid, signal.SIGKILL)
        broken = await reader.read(url, PAGE, "utf-8")
        again = await reader.read(url, PAGE, "utf-8")
        reader.close()
        return [first.text, broken.text, again.text]

    text = read_page(url, PAGE, "utf-8").text
    assert "nest on cliffs" in text
    assert asyncio.run(read()) == [text, "", text]
