"""A crawl: Scrapy in this process, without a reactor, and what it found as documents and a report."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from calpaca.core.errors import JobError, UsageError
from calpaca.core.jobs import Job, Ledger
from calpaca.core.near_duplicates import NearDuplicates
from calpaca.core.paths import atomic_file, cache_dir
from calpaca_crawl.page import Page
from calpaca_crawl.web_options import WebOptions

_UNFINISHED = {"interrupted", "failed", "cancelled"}


def begun(ledger: Ledger, kind: str, parameters: dict[str, Any]) -> str:
    """When the crawl began that this one goes on with: the last with these parameters, if it did not end by itself."""
    same = (record for record in ledger.jobs() if record.kind == kind and _same(record.parameters, parameters))
    last = next(same, None)
    return str(last.parameters["begun"]) if last and last.state in _UNFINISHED else datetime.now(UTC).isoformat()


def _same(recorded: Any, parameters: dict[str, Any]) -> bool:
    return {name: value for name, value in recorded.items() if name not in {"begun", "argv", "cwd"}} == parameters


def crawl(
    starts: Sequence[str], options: WebOptions, job: Job, started: str, progress: Callable[[Any], None]
) -> dict[str, Any]:
    """Crawl, write the documents and give the report's figures. Raises JobError where no page could be had."""
    from scrapy.crawler import AsyncCrawlerRunner
    from scrapy.settings import Settings

    from calpaca_crawl.site_spider import SiteSpider

    for name in ("scrapy", "httpx", "httpx2", "trafilatura", "htmldate", "charset_normalizer"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    runner = AsyncCrawlerRunner(Settings(scrapy_settings(options)))
    crawler = runner.create_crawler(SiteSpider)

    async def run() -> None:
        await runner.crawl(crawler, tuple(starts), options, job, started, progress)

    asyncio.run(run())
    spider: Any = crawler.spider
    if spider is None or crawler.stats is None:
        raise JobError("The crawler could not be started.", "Set CALPACA_DEBUG=1 and look at its log.")
    kept, duplicates = distinct(spider.pages.values(), options)
    write(kept, options)
    figures = _figures(crawler.stats.get_stats(), job) | {"documents": len(kept), **duplicates}
    figures["languages"] = _counted(page.language for page in kept)
    return figures


def scrapy_settings(options: WebOptions) -> dict[str, Any]:
    """Scrapy's settings for a crawl (https://docs.scrapy.org/en/latest/topics/settings.html).

    Raises UsageError for a setting of the person's that an option of ours, or safety, decides.
    """
    given = dict(setting.split("=", 1) for setting in options.scrapy)
    ours = _own_settings(options)
    if taken := sorted(given.keys() & ours):
        raise UsageError(f"{taken[0]} is not a setting that can be given.", "An option of the command decides it.")
    return {**ours, **given}


def _own_settings(options: WebOptions) -> dict[str, Any]:
    return {
        "TWISTED_REACTOR_ENABLED": False,
        "TELNETCONSOLE_ENABLED": False,
        "LOG_ENABLED": False,
        "COOKIES_ENABLED": False,
        "USER_AGENT": options.user_agent,
        # With max-age=0 the cache asks the server whether a page has changed, and does not guess it from its age.
        "DEFAULT_REQUEST_HEADERS": {
            "Accept": "text/html,application/pdf;q=0.9,*/*;q=0.5",
            "Cache-Control": "max-age=0",
        },
        "ROBOTSTXT_OBEY": options.robots,
        "DOWNLOAD_TIMEOUT": options.timeout,
        "DOWNLOAD_MAXSIZE": int(options.max_megabytes * 1e6),
        "DOWNLOAD_WARNSIZE": 0,
        "DOWNLOAD_DELAY": options.delay,
        "CONCURRENT_REQUESTS": options.in_flight,
        # Pages that wait to be read hold up new requests: a kill loses them, and each counts as a kilobyte at least.
        "SCRAPER_SLOT_MAX_ACTIVE_SIZE": 1024 * options.in_flight,
        "CONCURRENT_REQUESTS_PER_DOMAIN": options.per_host,
        "RETRY_TIMES": options.retries,
        "REDIRECT_MAX_TIMES": 8,
        "DEPTH_LIMIT": options.depth or -1,
        "DEPTH_PRIORITY": 1,
        "SCHEDULER_DISK_QUEUE": "scrapy.squeues.PickleFifoDiskQueue",
        "SCHEDULER_MEMORY_QUEUE": "scrapy.squeues.FifoMemoryQueue",
        "HTTPCACHE_ENABLED": options.cache,
        "HTTPCACHE_DIR": str(cache_dir() / "crawl"),
        "HTTPCACHE_POLICY": "scrapy.extensions.httpcache.RFC2616Policy",
        "CALPACA_ALLOWED_NETWORKS": list(options.networks),
        "DOWNLOAD_HANDLERS": {
            "http": "calpaca_crawl.guarded_connection.GuardedHandler",
            "https": "calpaca_crawl.guarded_connection.GuardedHandler",
            **dict.fromkeys(("data", "file", "ftp", "s3")),
        },
        "DOWNLOADER_MIDDLEWARES": {
            "calpaca_crawl.site_spider.RecordedPages": 20,
            **({"calpaca_crawl.browser.RenderedPages": 500} if options.browser else {}),
            "calpaca_crawl.address_guard.AddressGuard": 610,
        },
    }


def distinct(pages: Any, options: WebOptions) -> tuple[list[Page], dict[str, int]]:
    """The pages by address, without those that say nearly what an earlier one says, or next to nothing."""
    pool, kept = NearDuplicates(options.similarity), []
    short = duplicates = 0
    for page in sorted(pages, key=lambda page: page.url):
        if page.file is None and len(page.text) < options.shortest:
            short += 1
        elif page.file is None and pool.add(page.text) is not None:
            duplicates += 1
        else:
            kept.append(replace(page))
    return kept, {"too_short": short, "near_duplicates": duplicates}


def write(pages: Sequence[Page], options: WebOptions) -> None:
    """Write documents in the chosen form. Raises JobError when the disk is full or cannot be written."""
    with _writing(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        texts = [page for page in pages if page.file is None]
        if options.form == "jsonl":
            with atomic_file(options.output / "documents.jsonl") as file, file.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(page.written(), ensure_ascii=False) + "\n" for page in texts)
            return
        for page in texts:
            with atomic_file(options.output / f"{_file_name(page.url)}.md") as file:
                file.write_text(_markdown(page), encoding="utf-8")


def write_report(figures: dict[str, Any], folder: Path) -> None:
    """Write the report beside the folder. Raises JobError as `write`."""
    with _writing(folder), atomic_file(report_path(folder)) as file:
        file.write_text(json.dumps(figures, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JobError(
            f"{folder} cannot be written: {error.strerror or error}.",
            "Free some space; the pages are kept: give the same command again.",
        ) from error


def check_output(options: WebOptions, resumed: bool) -> None:
    """Raise UsageError where the folder holds something else."""
    folder = options.output
    if folder.is_file():
        raise UsageError(f"{folder} is a file.", "Name a folder with --output.")
    if (
        folder.is_dir()
        and any(folder.iterdir())
        and not (resumed or options.overwrite or report_path(folder).is_file())
    ):
        raise UsageError(f"{folder} holds files that no crawl wrote.", "Name another folder, or say --overwrite.")


def check_browser() -> None:
    """Raise UsageError where pages cannot be rendered."""
    try:
        from calpaca_crawl.browser import check
    except ImportError as error:
        raise UsageError("Playwright is not installed.", "pip install 'calpaca-crawl[browser]'") from error
    check()


def report_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.report.json")


def _markdown(page: Page) -> str:
    head = [f"title: {json.dumps(page.title, ensure_ascii=False)}", f"url: {page.url}"]
    head += [f"date: {page.date}"] if page.date else []
    return "---\n" + "\n".join(head) + f"\n---\n\n{page.text}\n"


def _file_name(url: str) -> str:
    """A name that people recognise and no other page has."""
    import hashlib
    import re

    readable = re.sub(r"[^\w.-]+", "-", url.partition("://")[2]).strip("-")[:80]
    return f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def _figures(stats: dict[str, Any], job: Job) -> dict[str, Any]:
    failed = {name.rpartition("/")[2]: count for name, count in stats.items() if name.startswith("calpaca/failed/")}
    statuses = {
        name.rpartition("/")[2]: count
        for name, count in stats.items()
        if name.startswith("downloader/response_status_count/")
    }
    return {
        "pages": job.done,
        "reused": job.reused,
        "stopped": stats.get("finish_reason"),
        "requests": stats.get("downloader/request_count", 0),
        "bytes": stats.get("downloader/response_bytes", 0),
        "statuses": statuses,
        "failed": failed,
        "retried": stats.get("retry/count", 0),
        "robots_refused": stats.get("robotstxt/forbidden", 0),
        "refused_addresses": stats.get("calpaca/refused_addresses", 0),
        "rendered": stats.get("calpaca/rendered", 0),
        "unchanged": stats.get("httpcache/revalidate", 0),
        "seconds": round(stats.get("elapsed_time_seconds") or 0.0, 1),
    }


def _counted(values: Any) -> dict[str, int]:
    from collections import Counter

    return dict(Counter(str(value) for value in values if value).most_common())
