"""Websites as documents: a site on this machine with traps, limits, resuming and what is never asked."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from calpaca.cli.main import program
from calpaca.core.errors import JobError, UsageError
from calpaca.testing import fake_runtime

_spec = importlib.util.spec_from_file_location("trap_site", Path(__file__).with_name("trap_site.py"))
trap_site_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trap_site_module)
trap_site, SUBJECTS, CHINESE = trap_site_module.trap_site, trap_site_module.SUBJECTS, trap_site_module.CHINESE

TRAPS = (
    "/secret",
    "/loop",
    "/inside",
    "/elsewhere",
    "/huge",
    "/drip",
    "/broken",
    "/missing",
    "/gbk",
    "/manual.pdf",
    "/calendar/1",
)
PAGES = tuple(f"/{subject}" for subject in SUBJECTS)
FAST = (
    "--allow-network",
    "127.0.0.0/8",
    "--delay",
    "0",
    "--retries",
    "1",
    "--timeout",
    "2",
    "--max-megabytes",
    "1",
    "--depth",
    "4",
)


@pytest.fixture
def crawl(monkeypatch, tmp_path) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    runtime = fake_runtime()  # the process's own one keeps the ledger of an earlier test
    monkeypatch.setattr("calpaca_crawl.commands.web.shared_runtime", lambda: runtime)
    return lambda *arguments: CliRunner().invoke(program, ["crawl", "web", *arguments])


def documents(folder: str = "corpus") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "documents.jsonl").read_text(encoding="utf-8").splitlines()]


def report(folder: str = "corpus") -> dict:
    return json.loads(Path(f"{folder}.report.json").read_text(encoding="utf-8"))


def test_a_site_with_traps_is_crawled_twice_with_the_same_result(crawl) -> None:
    with trap_site((*PAGES, *TRAPS)) as site:
        domains = ("--domain", "127.0.0.1", "--domain", "10.0.0.1")
        first = crawl(site.url, *FAST, *domains)
        assert first.exit_code == 0, (first.output, first.exception)
        once, found, asked = documents(), report(), dict(site.asked)
        second = crawl(site.url, *FAST, *domains, "--output", "again")
        assert second.exit_code == 0, second.output
        assert documents("again") == once
        assert site.unchanged == len(SUBJECTS)
    addresses = {document["url"].rpartition("/")[2] for document in once}
    assert addresses >= set(SUBJECTS) - {"falcons"} | {"gbk"}
    assert len(addresses & {"falcons", "copy"}) == 1
    assert all(count == 1 for path, count in asked.items() if path in {*PAGES, "/", "/gbk", "/copy"})
    assert "/secret" not in asked
    assert found["robots_refused"] == 1
    assert found["refused_addresses"] == 2  # the private page and its robots.txt; Scrapy follows no redirect to a file
    assert found["statuses"]["500"] == 2
    assert {"HttpError", "DownloadCancelledError"} <= found["failed"].keys()
    assert max(int(path.rpartition("/")[2]) for path in asked if path.startswith("/calendar")) <= 8
    assert site.agents == {"None"}
    assert [file.suffix for file in Path("corpus/files").iterdir()] == [".pdf"]


def test_a_page_in_gbk_that_calls_itself_utf_8_is_read(crawl) -> None:
    with trap_site(("/gbk",)) as site:
        crawl(site.url, *FAST)
    (chinese,) = [each for each in documents() if each["url"].endswith("/gbk")]
    assert CHINESE[:60] in chinese["text"]
    assert (chinese["title"], chinese["language"]) == ("图书馆", "zh")


def test_private_addresses_are_refused_unless_they_are_allowed(crawl) -> None:
    with trap_site(PAGES) as site:
        for start in (
            site.url,
            site.url.replace("127.0.0.1", "localhost"),
            site.url.replace("127.0.0.1", "[::ffff:127.0.0.1]"),
        ):
            result = crawl(start, "--delay", "0", "--no-robots")
            assert isinstance(result.exception, JobError)
        assert not site.asked


def test_robots_are_passed_over_only_when_that_is_said(crawl) -> None:
    with trap_site(("/secret",)) as site:
        crawl(site.url, *FAST, "--no-robots", "--shortest", "10")
        assert site.asked["/secret"] == 1
        assert site.asked["/robots.txt"] == 0


def test_pages_and_patterns_limit_what_is_asked(crawl) -> None:
    with trap_site((*PAGES, "/calendar/1")) as site:
        crawl(site.url, *FAST, "--exclude", "calendar", "--exclude", "violins")
        assert "/violins" not in site.asked
        assert not any(path.startswith("/calendar") for path in site.asked)
        crawl(site.url, *FAST, "--max-pages", "3", "--in-flight", "1", "--output", "few")
    assert report("few")["stopped"] == "max_pages"
    assert report("few")["pages"] == 3


def test_markdown_files_hold_title_and_address(crawl) -> None:
    with trap_site(("/violins",)) as site:
        crawl(site.url, *FAST, "--form", "markdown")
    (page,) = Path("corpus").glob("*violins*.md")
    assert page.read_text(encoding="utf-8").startswith(
        f'---\ntitle: "Violins"\nurl: {site.url}violins\n---\n\n# Violins'
    )


def test_a_crawl_that_was_killed_goes_on_and_asks_for_no_page_twice(crawl, tmp_path) -> None:
    with trap_site(PAGES, pause=0.15) as site:
        arguments = ["crawl", "web", site.url, *FAST, "--in-flight", "1", "--no-cache"]
        process = subprocess.Popen([sys.executable, "-m", "calpaca", *arguments], cwd=tmp_path, env=os.environ)
        deadline = time.monotonic() + 60
        while sum(site.asked[path] for path in PAGES) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not Path("corpus/documents.jsonl").exists()
        assert crawl(*arguments[2:]).exit_code == 0
        again = report()["reused"]
        assert again >= 2
        assert sum(site.asked[path] for path in PAGES) <= len(PAGES) + 1  # the one that was under way
        whole = documents()
        crawl(*arguments[2:], "--output", "whole")
        assert documents("whole") == whole


def test_a_folder_with_other_files_is_left_alone(crawl, tmp_path) -> None:
    Path("corpus").mkdir()
    Path("corpus/mine.txt").write_text("mine")
    with trap_site(PAGES) as site:
        assert isinstance(crawl(site.url, *FAST).exception, UsageError)
        assert not site.asked


@pytest.mark.parametrize("address", ["ftp://example.org/", "file:///etc/passwd", "example.org"])
def test_what_is_no_website_is_refused(crawl, address) -> None:
    assert isinstance(crawl(address).exception, UsageError)
