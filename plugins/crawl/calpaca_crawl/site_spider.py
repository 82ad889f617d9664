"""The spider: from the start addresses along links, each page once, those of an interrupted run from the ledger."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scrapy import Request, Spider, signals
from scrapy.exceptions import CloseSpider, StopDownload
from scrapy.http import Response, TextResponse
from scrapy.linkextractors import LinkExtractor
from scrapy.utils.gz import gunzip, gzip_magic_number
from scrapy.utils.sitemap import Sitemap, sitemap_urls_from_robots

from calpaca.core.jobs import Job, step_key
from calpaca.core.paths import atomic_file
from calpaca_crawl.page import Page
from calpaca_crawl.page_reader import PageReader
from calpaca_crawl.web_options import WebOptions

KIND = "crawl_web"
_RECORDED = "recorded"
_MOST_SITEMAPS = 50


class RecordedPages:
    """A downloader middleware: a page that an interrupted run has read is given from the ledger and not asked again."""

    def __init__(self, crawler: Any) -> None:
        self._crawler = crawler

    @classmethod
    def from_crawler(cls, crawler: Any) -> RecordedPages:
        return cls(crawler)

    def process_request(self, request: Any) -> Any:
        found = self._crawler.spider.recorded(request.url)
        return None if found is None else TextResponse(request.url, body=found, encoding="utf-8", flags=[_RECORDED])


class SiteSpider(Spider):  # type: ignore[misc]
    """Follows links within the allowed domains. `pages` are those that were read, by the address they have."""

    name = "calpaca"

    def __init__(self, starts: tuple[str, ...], options: WebOptions, job: Job, begun: str, progress: Any) -> None:
        super().__init__()
        self.options = options
        self.job = job
        self.pages: dict[str, Page] = {}
        self._starts = starts
        self._begun = begun
        self._progress = progress
        self._reader = PageReader()
        self._most_bytes = int(options.max_megabytes * 1e6)
        self._sitemaps = 0
        self._received: dict[int, float] = {}
        self._ends = time.monotonic() + (options.max_time or float("inf"))
        hosts = [urlsplit(url).hostname or "" for url in starts]
        self.allowed_domains = list(options.domains) or list(dict.fromkeys(hosts))
        kept = {"pdf"} if options.pdf else set()
        self._links = LinkExtractor(deny_extensions=sorted(_NO_PAGES - kept), unique=True)

    @classmethod
    def from_crawler(cls, crawler: Any, *args: Any, **kwargs: Any) -> SiteSpider:
        spider = super().from_crawler(crawler, *args, **kwargs)
        crawler.signals.connect(spider._watch, signal=signals.bytes_received)
        return spider  # type: ignore[no-any-return]

    def _watch(self, request: Any, **_: Any) -> None:
        """A page that comes drop by drop is given up when its time is over."""
        begun = self._received.setdefault(id(request), time.monotonic())
        if time.monotonic() - begun > self.options.timeout:
            raise StopDownload(fail=True)

    # Requests ------------------------------------------------------------------------------------------------------
    async def start(self) -> AsyncIterator[Any]:
        for url in self._starts:
            yield Request(url, errback=self.failed)
            if self.options.sitemap:
                parts = urlsplit(url)
                yield Request(f"{parts.scheme}://{parts.netloc}/robots.txt", self.parse_robots, priority=10)
                yield Request(f"{parts.scheme}://{parts.netloc}/sitemap.xml", self.parse_sitemap, priority=10)

    def parse_robots(self, response: Any) -> Iterator[Any]:
        for url in sitemap_urls_from_robots(response.body, response.url):
            yield Request(url, self.parse_sitemap, priority=10)

    def parse_sitemap(self, response: Any) -> Iterator[Any]:
        self._sitemaps += 1
        if self._sitemaps > _MOST_SITEMAPS:
            return
        response.meta["depth"] = -1  # what is listed is as near as a start address
        packed = gzip_magic_number(response)
        found = Sitemap(gunzip(response.body, max_size=self._most_bytes) if packed else response.body)
        for entry in found:
            if found.type == "sitemapindex":
                yield Request(entry["loc"], self.parse_sitemap, priority=10)
            elif self._wanted(entry["loc"]):
                yield Request(entry["loc"], errback=self.failed)

    def _wanted(self, url: str) -> bool:
        host = urlsplit(url).hostname or ""
        return (
            any(host == domain or host.endswith(f".{domain}") for domain in self.allowed_domains)
            and (not self.options.include or any(re.search(each, url) for each in self.options.include))
            and not any(re.search(each, url) for each in self.options.exclude)
        )

    # Pages ---------------------------------------------------------------------------------------------------------
    async def parse(self, response: Response, **_: Any) -> AsyncIterator[Any]:
        recorded = _RECORDED in response.flags
        record = json.loads(response.body) if recorded else await self._read(response)
        if self.job.done >= self.options.max_pages:  # some are still on their way when the last one is read
            return
        if recorded:
            self.job.reused += 1
        else:
            self.job.ledger.put_many(
                KIND, {self._key(response.request.url): json.dumps(record, ensure_ascii=False).encode()}
            )
        self.job.done += 1
        self._keep(record)
        for url in record["links"]:
            yield Request(url, errback=self.failed)

    def _keep(self, record: dict[str, Any]) -> None:
        page = Page(**record["page"])
        if page.text or page.file:
            self.pages.setdefault(page.url, page)
        self._progress(self)
        if self.job.done >= self.options.max_pages:
            raise CloseSpider("max_pages")
        if time.monotonic() > self._ends:
            raise CloseSpider("max_time")

    def closed(self, _: str) -> None:
        """Called by Scrapy at the end."""
        self._reader.close()

    async def _read(self, response: Response) -> dict[str, Any]:
        """What the ledger keeps of a page: the document, and the links that are followed from it."""
        self._received.pop(id(response.request), None)
        kind = (response.headers.get("Content-Type") or b"").decode("latin-1").lower()
        if "pdf" in kind or response.body.startswith(b"%PDF-"):
            return {"page": asdict(self._kept_pdf(response)), "links": []}
        if not isinstance(response, TextResponse) or ("html" not in kind and "text/plain" not in kind):
            self.crawler.stats.inc_value("calpaca/other_types")
            return {"page": asdict(Page(response.url)), "links": []}
        page = await self._reader.read(response.url, response.body, response._headers_encoding())
        links = (
            [link.url for link in self._links.extract_links(response) if self._wanted(link.url)]
            if "html" in kind
            else []
        )
        return {"page": asdict(page), "links": links}

    def _kept_pdf(self, response: Response) -> Page:
        if not self.options.pdf:
            return Page(response.url)
        name = f"{hashlib.sha256(response.url.encode()).hexdigest()[:12]}.pdf"
        with atomic_file(Path(self.options.output) / "files" / name) as unfinished:
            unfinished.write_bytes(response.body)
        return Page(response.url, title=Path(urlsplit(response.url).path).name, file=f"files/{name}")

    def failed(self, failure: Any) -> None:
        """Count why a page could not be had."""
        self.crawler.stats.inc_value(f"calpaca/failed/{failure.type.__name__}")
        self._progress(self)

    # The ledger ----------------------------------------------------------------------------------------------------
    def recorded(self, url: str) -> bytes | None:
        key = self._key(url)
        return self.job.ledger.get_many([key]).get(key)

    def _key(self, url: str) -> str:
        return step_key(KIND, starts=self._starts, begun=self._begun, url=url)


_NO_PAGES = frozenset({
    "7z", "avi", "bmp", "bz2", "css", "doc", "docx", "exe", "gif", "gz", "ico", "iso", "jpeg", "jpg", "js", "m4a", "mov", "mp3",
    "mp4", "mpeg", "msi", "odt", "ogg", "pdf", "png", "ppt", "pptx", "rar", "rss", "svg", "tar", "tgz", "tif", "ttf", "wav",
    "webm", "webp", "woff", "woff2", "xls", "xlsx", "xz", "zip",
})  # fmt: skip
