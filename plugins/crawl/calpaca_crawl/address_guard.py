"""Addresses that a crawl may ask: http and https, on the public internet unless the person allows more.

A page is checked three times: its address, what the name resolves to before it is asked (also after each redirect), and
who really answered, before anything of the answer is used. A name that resolves to another machine the second time
(DNS rebinding) gets no further than that.
"""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit

from scrapy.exceptions import IgnoreRequest

SETTING = "CALPACA_ALLOWED_NETWORKS"
"""Networks of Scrapy's setting that may be asked although they are not public."""


class RefusedAddress(IgnoreRequest):  # type: ignore[misc]  # Scrapy is not checked  # Scrapy's name for what is left out
    """An address that a crawl does not ask."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also inside an IPv6 form of IPv4."""
    found = ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return found.is_global and not found.is_multicast and (inner is None or inner.is_global)


class AddressGuard:
    """A downloader middleware of Scrapy's. It counts what it refuses."""

    def __init__(self, crawler: Any) -> None:
        self._stats = crawler.stats
        self._networks = [ip_network(network) for network in crawler.settings.getlist(SETTING)]

    @classmethod
    def from_crawler(cls, crawler: Any) -> AddressGuard:
        return cls(crawler)

    async def process_request(self, request: Any) -> None:
        """Raises RefusedAddress, which ends the request."""
        address = urlsplit(request.url)
        if address.scheme not in {"http", "https"} or not address.hostname or address.username:
            self._refuse(request.url, "not an address of a page")
        if request.meta.get("proxy"):
            return
        for found in await self._resolved(str(address.hostname), address.port or 0):
            if not self._may_be_asked(found):
                self._refuse(request.url, f"{found} is no public address")

    def process_response(self, request: Any, response: Any) -> Any:
        """The response, if it came from a public address. Raises RefusedAddress."""
        answered = response.ip_address
        if answered is not None and not request.meta.get("proxy") and not self._may_be_asked(str(answered)):
            self._refuse(request.url, f"{answered} answered, which is no public address")
        return response

    def _may_be_asked(self, address: str) -> bool:
        found = ip_address(address.partition("%")[0])
        return is_public(address) or any(found in network for network in self._networks)

    async def _resolved(self, host: str, port: int) -> list[str]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            return []  # the request fails for this reason by itself
        return [str(entry[4][0]) for entry in found]

    def _refuse(self, url: str, reason: str) -> None:
        self._stats.inc_value("calpaca/refused_addresses")
        raise RefusedAddress(f"{url} is not asked: {reason}")
