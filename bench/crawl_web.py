"""`calpaca crawl web` beside a bare Scrapy spider, on a website of this machine; and killed and resumed.

    python bench/crawl_web.py [--pages 2000] [--rounds 3] [--kills 2] [--seed 0]

Three programs take turns: ours, a spider that follows links and takes titles (`bare`), and one that also extracts the text
with our own function (`bare_with_text`), see bench/crawl_bare.py. `ratio` is the bare spider's time divided by ours, best
round of each: 1 is as fast. Then ours is killed, with SIGKILL, at moments drawn with --seed and given again: the same
documents must come out, and no page be asked for twice but those that were on their way or not read yet. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
IN_FLIGHT = 16
OURS = ("--allow-network", "127.0.0.0/8", "--delay", "0", "--per-host", str(IN_FLIGHT), "--in-flight", str(IN_FLIGHT),
        "--depth", "50", "--max-pages", "1000000", "--no-cache")  # fmt: skip


@contextmanager
def site(pages: int) -> Iterator[str]:
    command = [sys.executable, str(BENCH / "crawl_site.py"), "--pages", str(pages)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def counts(address: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{address}/counts") as response:  # our own address
        return dict(json.load(response))


def asked(address: str) -> int:
    with urllib.request.urlopen(f"{address}/asked") as response:
        return int(json.load(response))


def ours(address: str, folder: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "calpaca",
        "crawl",
        "web",
        f"{address}/p/0",
        *OURS,
        "--output",
        str(folder / "corpus"),
    ]


def bare(address: str, folder: Path, *flags: str) -> list[str]:
    return [sys.executable, str(BENCH / "crawl_bare.py"), f"{address}/p/0", str(folder / "bare.jsonl"), *flags]


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall-clock and processor seconds of a program and those that it starts."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begun, used


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "CALPACA_DATA": str(folder / "data"), "CALPACA_CACHE": str(folder / "cache")}


def in_turns(address: str, pages: int, rounds: int) -> dict[str, Any]:
    programs = {"ours": ours, "bare": bare, "bare_with_text": lambda *where: bare(*where, "--text")}
    wall: dict[str, list[float]] = {name: [] for name in programs}
    used: dict[str, list[float]] = {name: [] for name in programs}
    once = True
    for _ in range(rounds):
        for name, command in programs.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds, processor = timed(command(address, Path(folder)), Path(folder))
            wall[name].append(seconds)
            used[name].append(processor)
            found = counts(address)
            once = once and len(found) == pages and (name != "ours" or set(found.values()) == {1})
    return {
        "seconds": {name: round(min(found), 2) for name, found in wall.items()},
        "seconds_of_processor": {name: round(min(found), 2) for name, found in used.items()},
        "ratio": {name: round(min(found) / min(wall["ours"]), 2) for name, found in wall.items() if name != "ours"},
        "ratio_of_processor": {
            name: round(min(found) / min(used["ours"]), 2) for name, found in used.items() if name != "ours"
        },
        "each_page_once": once,
    }


def killed(address: str, pages: int, chance: random.Random) -> dict[str, Any]:
    """Kill ours once some share of the pages is asked for, give it again, and compare with a run that was left alone."""
    with tempfile.TemporaryDirectory() as name:
        folder, whole = Path(name, "killed"), Path(name, "whole")
        subprocess.run(ours(address, whole), check=True, env=environment(whole), capture_output=True)
        counts(address)
        share = chance.uniform(0.1, 0.9)
        process = subprocess.Popen(
            ours(address, folder), env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while asked(address) < share * pages:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = sum(counts(address).values())
        subprocess.run(ours(address, folder), check=True, env=environment(folder), capture_output=True)
        again = sum(counts(address).values())
        documents = [(each / "corpus" / "documents.jsonl").read_bytes() for each in (whole, folder)]
    return {
        "asked_before": done, "asked_after": again, "asked_twice": done + again - pages,
        "same_documents": documents[0] == documents[1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with site(options.pages) as address:
        figures = {"pages": options.pages, **in_turns(address, options.pages, options.rounds)}
        chance = random.Random(options.seed)  # no secret
        figures["killed"] = [killed(address, options.pages, chance) for _ in range(options.kills)]
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
