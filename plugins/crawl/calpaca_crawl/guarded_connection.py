"""Connections to addresses that were checked: a name is resolved once, and what is connected to is what was looked at.

A name that is public when it is checked and private a moment later (DNS rebinding) gets nowhere: only the addresses that
passed here reach aiohttp's connector. TLS still asks for the certificate of the name.
"""

from __future__ import annotations

import socket
from typing import Any

from aiohttp import ThreadedResolver
from aiohttp.abc import ResolveResult
from scrapy.core.downloader.handlers._aiohttp import AiohttpDownloadHandler

from calpaca_crawl.address_guard import Networks, RefusedAddress


class GuardedResolver(ThreadedResolver):
    """aiohttp's resolver, which gives only addresses that may be asked."""

    def __init__(self, networks: Networks, stats: Any) -> None:
        super().__init__()
        self._networks = networks
        self._stats = stats

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises RefusedAddress where a name has addresses, but none that may be asked."""
        found = await super().resolve(host, port, family)
        allowed = [each for each in found if each["host"] in self._networks]
        if found and not allowed:
            self._stats.inc_value("calpaca/refused_addresses")
            raise RefusedAddress(f"{host} is not asked: {found[0]['host']} is no public address")
        return allowed


class GuardedHandler(AiohttpDownloadHandler):  # type: ignore[misc]  # Scrapy is not checked
    """Scrapy's handler of http and https over aiohttp, with guarded connections."""

    def __init__(self, crawler: Any) -> None:
        super().__init__(crawler)
        self._session.connector._resolver = GuardedResolver(Networks.of(crawler.settings), crawler.stats)
