"""The peer of bench/crawl_web.py: a Scrapy spider that follows links and writes what it reads, and nothing besides.

    python bench/crawl_bare.py START OUTPUT.jsonl [--text]

Writes address and title of each page; with --text its main text, title, date and language too, as `calpaca crawl web`.
Scrapy's own settings but for the requests at once, which are those that the bench gives to both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import scrapy
from scrapy.crawler import CrawlerProcess
from scrapy.linkextractors import LinkExtractor

START, OUTPUT, *REST = sys.argv[1:]


class BareSpider(scrapy.Spider):  # type: ignore[misc]  # Scrapy is not checked
    name = "bare"
    start_urls = (START,)
    _links = LinkExtractor()

    def parse(self, response: Any, **_: Any) -> Iterator[Any]:
        yield self._with_text(response) if REST else {"url": response.url, "title": response.css("title::text").get()}
        for link in self._links.extract_links(response):
            yield response.follow(link, self.parse)

    def _with_text(self, response: Any) -> dict[str, Any]:
        from calpaca_crawl.page import read_page

        return read_page(response.url, response.body, "utf-8").written()


if __name__ == "__main__":
    process = CrawlerProcess({
        "CONCURRENT_REQUESTS": 16, "CONCURRENT_REQUESTS_PER_DOMAIN": 16, "DOWNLOAD_DELAY": 0, "LOG_LEVEL": "ERROR",
        "TELNETCONSOLE_ENABLED": False, "ROBOTSTXT_OBEY": False, "FEEDS": {OUTPUT: {"format": "jsonlines"}},
    })  # fmt: skip
    process.crawl(BareSpider)
    process.start()
