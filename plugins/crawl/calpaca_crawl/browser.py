"""Pages that JavaScript writes, rendered by a headless Chromium that has no network of its own.

Whatever a page asks for goes through the crawl, like any other request: by the same checked connections, robots.txt,
delays and limits of size. The browser is given the answers. What it might send past that runs into a closed port.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import Any

from playwright.async_api import Browser as Chromium
from playwright.async_api import Error, Playwright, Route, async_playwright
from scrapy import Request, signals
from scrapy.http import HtmlResponse

from calpaca.core.errors import UsageError

_PART = "calpaca_part_of_page"
_NOT_NEEDED = frozenset({"image", "media", "font", "stylesheet", "manifest", "ping", "websocket"})
_NOT_PASSED_ON = frozenset({"content-encoding", "content-length", "transfer-encoding", "set-cookie", "connection"})
_CLOSED_PORT = "http://127.0.0.1:9"
_AT_ONCE = 4


class RenderedPages:
    """A downloader middleware of Scrapy's: a page's HTML becomes what its scripts make of it."""

    def __init__(self, crawler: Any) -> None:
        self._crawler = crawler
        self._timeout = crawler.settings.getfloat("DOWNLOAD_TIMEOUT") * 1000
        self._agent = crawler.settings["USER_AGENT"]
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._starting = asyncio.Lock()
        self._playwright: Playwright | None = None
        self._chromium: Chromium | None = None

    @classmethod
    def from_crawler(cls, crawler: Any) -> RenderedPages:
        made = cls(crawler)
        crawler.signals.connect(made.close, signal=signals.spider_closed)
        return made

    async def process_response(self, request: Any, response: Any) -> Any:
        """The rendered page; as it came where its scripts fail or take longer than a page may."""
        wanted = request.callback is None and request.meta.get("depth") is not None
        if not wanted or request.meta.get(_PART) or not isinstance(response, HtmlResponse) or response.status != 200:
            return response
        async with self._room:
            try:
                content = await self._rendered(response)
            except Error:
                self._crawler.stats.inc_value("calpaca/not_rendered")
                return response
        self._crawler.stats.inc_value("calpaca/rendered")
        return response.replace(
            body=content.encode(), encoding="utf-8", headers={"Content-Type": "text/html; charset=utf-8"}
        )

    async def _rendered(self, response: HtmlResponse) -> str:
        context = await (await self._started()).new_context(user_agent=self._agent, service_workers="block")
        try:
            await context.route("**/*", lambda route: self._answer(route, response))
            page = await context.new_page()
            await page.goto(response.url, wait_until="networkidle", timeout=self._timeout)
            return str(await page.content())
        finally:
            await context.close()

    async def _answer(self, route: Route, page: HtmlResponse) -> None:
        """Give the browser the page itself, or a part of it that is fetched by the crawl; nothing else."""
        asked = route.request
        if asked.url == page.url and asked.is_navigation_request():
            await route.fulfill(status=200, headers=_headers(page), body=page.body)
        elif asked.is_navigation_request() or asked.method != "GET" or asked.resource_type in _NOT_NEEDED:
            await route.abort()
        else:
            await self._fetch(route)

    async def _fetch(self, route: Route) -> None:
        part = Request(route.request.url, meta={_PART: True, "handle_httpstatus_all": True}, dont_filter=True)
        try:
            answer = await self._crawler.engine.download_async(part)
        except Exception:  # whatever keeps the crawl from asking: the page goes without it
            await route.abort()
        else:
            await route.fulfill(status=answer.status, headers=_headers(answer), body=answer.body)

    async def _started(self) -> Chromium:
        async with self._starting:
            if self._chromium is None:
                self._playwright = await async_playwright().start()
                self._chromium = await launched(self._playwright)
            return self._chromium

    async def close(self) -> None:
        """End the browser with the crawl."""
        if self._chromium is not None:
            await self._chromium.close()
        if self._playwright is not None:
            await self._playwright.stop()


async def launched(playwright: Playwright) -> Chromium:
    """The system's Chromium, or Playwright's own. Raises UsageError where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    confined = hasattr(os, "geteuid") and os.geteuid() != 0  # Chromium's sandbox does not work for root
    try:
        return await playwright.chromium.launch(
            executable_path=found, chromium_sandbox=confined, proxy={"server": _CLOSED_PORT, "bypass": "<-loopback>"}
        )
    except Error as error:
        raise UsageError(
            f"No browser can be started: {error.message.splitlines()[0]}",
            "Install one: apt install chromium, or: playwright install chromium",
        ) from error


async def _try() -> None:
    async with async_playwright() as playwright:
        await (await launched(playwright)).close()


def check() -> None:
    """Raise UsageError where no browser can be started."""
    asyncio.run(_try())


def _headers(response: Any) -> dict[str, str]:
    named = {name.decode("latin-1").lower(): values for name, values in response.headers.items()}
    return {
        name: values[-1].decode("latin-1") for name, values in named.items() if name not in _NOT_PASSED_ON and values
    }
