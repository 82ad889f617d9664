"""Websites as documents: a site on this machine with traps, limits, resuming and what is never asked."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
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

SUBJECTS = ("falcons", "harbours", "violins", "orchards", "glaciers", "lanterns", "saddles", "planets")
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
LIMITS = ("--delay", "0", "--retries", "1", "--timeout", "2", "--max-megabytes", "1", "--depth", "4")
FAST = ("--allow-network", "127.0.0.0/8", *LIMITS)


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


def test_a_site_with_traps_is_crawled_twice_with_the_same_result(crawl, trap_site) -> None:
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
    assert site.cookies == {"None"}
    assert [file.suffix for file in Path("corpus/files").iterdir()] == [".pdf"]


def test_a_page_in_gbk_that_calls_itself_utf_8_is_read(crawl, trap_site, trap_site_module) -> None:
    with trap_site(("/gbk",)) as site:
        crawl(site.url, *FAST)
    text = trap_site_module.CHINESE
    (chinese,) = [each for each in documents() if each["url"].endswith("/gbk")]
    assert text[:60] in chinese["text"]
    assert (chinese["title"], chinese["language"]) == ("图书馆", "zh")


def test_private_addresses_are_refused_unless_they_are_allowed(crawl, trap_site) -> None:
    with trap_site(PAGES) as site:
        for start in (
            site.url,
            site.url.replace("127.0.0.1", "localhost"),
            site.url.replace("127.0.0.1", "[::ffff:127.0.0.1]"),
        ):
            result = crawl(start, "--delay", "0", "--no-robots")
            assert isinstance(result.exception, JobError)
            assert "--allow-network" in result.exception.hint
        assert not site.asked


def test_robots_are_passed_over_only_when_that_is_said(crawl, trap_site) -> None:
    with trap_site(("/secret",)) as site:
        crawl(site.url, *FAST, "--no-robots", "--shortest", "10")
        assert site.asked["/secret"] == 1
        assert site.asked["/robots.txt"] == 0


def test_pages_and_patterns_limit_what_is_asked(crawl, trap_site) -> None:
    with trap_site((*PAGES, "/calendar/1")) as site:
        crawl(site.url, *FAST, "--exclude", "calendar", "--exclude", "violins")
        assert "/violins" not in site.asked
        assert not any(path.startswith("/calendar") for path in site.asked)
        crawl(site.url, *FAST, "--max-pages", "3", "--in-flight", "1", "--output", "few")
    assert report("few")["stopped"] == "max_pages"
    assert report("few")["pages"] == 3


def test_markdown_files_hold_title_and_address(crawl, trap_site) -> None:
    with trap_site(("/violins",)) as site:
        crawl(site.url, *FAST, "--form", "markdown")
    (page,) = Path("corpus").glob("*violins*.md")
    assert page.read_text(encoding="utf-8").startswith(
        f'---\ntitle: "Violins"\nurl: {site.url}violins\n---\n\n# Violins'
    )


@pytest.mark.slow
def test_a_crawl_that_was_killed_goes_on_and_asks_for_no_page_twice(crawl, trap_site, tmp_path) -> None:
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


def test_a_folder_with_other_files_is_left_alone(crawl, trap_site, tmp_path) -> None:
    Path("corpus").mkdir()
    Path("corpus/mine.txt").write_text("mine")
    with trap_site(PAGES) as site:
        assert isinstance(crawl(site.url, *FAST).exception, UsageError)
        assert not site.asked


@pytest.mark.parametrize("address", ["ftp://example.org/", "file:///etc/passwd", "example.org"])
def test_what_is_no_website_is_refused(crawl, address) -> None:
    assert isinstance(crawl(address).exception, UsageError)


def test_the_pages_of_sitemaps_are_begun_with(crawl, trap_site) -> None:
    with trap_site(()) as site:
        crawl(site.url, *FAST, "--sitemap", "--depth", "1", "--exclude", "copy")
        assert site.asked["/harbours"] == 1
    assert {each["url"].rpartition("/")[2] for each in documents()} >= {"falcons", "harbours", "lanterns"}


def test_a_name_that_becomes_private_between_two_requests_is_never_connected_to(crawl, trap_site, monkeypatch) -> None:
    """The first answer is allowed, all later ones are not: DNS rebinding."""
    answers = iter(["127.0.0.2"])

    def resolve(_: str, port: int, *__: object, **___: object) -> list:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers, "127.0.0.1"), port))]

    with trap_site(PAGES, host="0.0.0.0") as site:
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        start = f"http://rebinding.test:{site.server_port}/"
        crawl(start, *LIMITS, "--no-robots", "--allow-network", "127.0.0.2/32")
        assert site.asked["/"] == 1
        assert site.reached_at == {"127.0.0.2"}


def test_ten_gigabytes_are_not_read(crawl, trap_site) -> None:
    with trap_site(("/ten-gigabytes", "/violins")) as site:
        crawl(site.url, *FAST)
        assert site.sent["/ten-gigabytes"] < 20_000_000
    assert report()["failed"]["DownloadCancelledError"] == 1
    assert any(each["url"].endswith("/violins") for each in documents())


@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid() != 0, reason="needs the right to mount a tiny disk")
@pytest.mark.slow
def test_a_full_disk_is_named_and_what_was_read_is_kept(crawl, trap_site, tmp_path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    with trap_site(PAGES) as site:
        arguments = [site.url, *FAST, "--output", str(small / "corpus")]
        command = f"mount -t tmpfs -o size=4k none {small} && exec {sys.executable} -m calpaca crawl web {shlex.join(arguments)}"
        done = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True, check=False)
        if "mount:" in done.stderr or "unshare:" in done.stderr:
            pytest.skip("mounting is not allowed here")
        assert done.returncode == 1
        assert "cannot be written: No space left on device" in done.stderr
        asked = sum(site.asked[path] for path in PAGES)
        assert crawl(*arguments).exit_code == 0
        assert sum(site.asked[path] for path in PAGES) == asked


@pytest.mark.slow
def test_a_page_that_a_script_writes_is_rendered_and_asks_for_nothing_private(crawl, trap_site) -> None:
    pytest.importorskip("playwright", reason="calpaca-crawl[browser] is not installed")
    from calpaca_crawl.web_crawl import check_browser

    try:
        check_browser()
    except UsageError as error:
        pytest.skip(error.message)
    with trap_site(("/scripted",)) as site:
        result = crawl(site.url, *LIMITS, "--allow-network", "127.0.0.0/8", "--timeout", "20", "--browser")
        assert result.exit_code == 0, (result.output, result.exception)
        assert site.asked["/data.json"] == 1
        assert site.asked["/planets"] == 1
    (page,) = [each for each in documents() if each["url"].endswith("/scripted")]
    assert "Glaciers grind rock into flour" in page["text"]
    assert report()["refused_addresses"] >= 1
    assert report()["rendered"] >= 2


@pytest.mark.parametrize("setting", ["DOWNLOAD_HANDLERS={}", "COOKIES_ENABLED=1", "depth"])
def test_what_keeps_a_crawl_safe_cannot_be_set_otherwise(crawl, setting) -> None:
    assert isinstance(crawl("http://127.0.0.1:9/", "--scrapy", setting).exception, UsageError)
