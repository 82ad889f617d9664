"""A website on this machine for bench/crawl_web.py: pages of text that link to one another, served by one small process.

    python bench/crawl_site.py [--pages 2000]

Prints its address. `/counts` gives how often each page was asked for, as JSON, and begins to count anew; `/asked` gives how
many requests that were so far.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from random import Random

_WORDS = [
    "river", "mountain", "engine", "violin", "orchard", "planet", "lantern", "harbour", "carpet", "melon", "thunder",
    "pencil", "copper", "falcon", "saddle", "bridge", "market", "winter", "garden", "letter", "window", "basket",
    "kettle", "ladder", "mirror", "needle", "pepper", "ribbon", "silver", "tunnel", "valley", "weaver", "carries",
    "follows", "opens", "crosses", "measures", "paints", "repairs", "covers", "gathers", "shelters", "before",
    "behind", "beneath", "beside", "under",
]  # fmt: skip


def page(number: int, pages: int) -> bytes:
    """A page of about 3 kB: six paragraphs, links to two pages further down the tree and to three others."""
    chance = Random(number)  # no secret
    links = [2 * number + 1, 2 * number + 2, *(chance.randrange(pages) for _ in range(3))]
    anchors = "".join(f'<li><a href="/p/{link}">page {link}</a></li>' for link in links if link < pages)
    paragraphs = "".join(f"<p>{' '.join(chance.choices(_WORDS, k=60)).capitalize()}.</p>" for _ in range(6))
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Page {number}</title></head><body>'
        f"<nav><ul>{anchors}</ul></nav><article><h1>Page {number}</h1>{paragraphs}</article></body></html>"
    )
    return text.encode()


class Site:
    """Answers GET over connections that stay open."""

    def __init__(self, pages: int) -> None:
        self._pages = {f"/p/{number}": page(number, pages) for number in range(pages)}
        self._counts: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                status, kind, body = self._answer(head.split(b" ", 2)[1].decode())
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, path: str) -> tuple[str, str, bytes]:
        if path == "/counts":
            counts, self._counts = json.dumps(self._counts).encode(), Counter()
            return "200 OK", "application/json", counts
        if path == "/asked":
            return "200 OK", "application/json", json.dumps(self._counts.total()).encode()
        found = self._pages.get(path)
        if found is None:
            return "404 Not Found", "text/plain", b""
        self._counts[path] += 1
        return "200 OK", "text/html; charset=utf-8", found


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=2_000)
    server = await asyncio.start_server(Site(parser.parse_args().pages).serve, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
