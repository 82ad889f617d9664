"""Addresses that a crawl may ask: http and https, on the public internet unless the person allows more.

Links and redirects are judged here by what they say; what a name resolves to is judged where the connection is made
(guarded_connection.py), and here for a crawl by a proxy, since then it is the proxy that connects.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
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


class Networks:
    """The public internet, and networks that are allowed besides."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self._allowed = [ip_network(network) for network in allowed]

    @classmethod
    def of(cls, settings: Any) -> Networks:
        """Those of Scrapy's settings."""
        return cls(settings.getlist(SETTING))

    def __contains__(self, address: str) -> bool:
        found = ip_address(address.partition("%")[0])
        return is_public(address) or any(found in network for network in self._allowed)


class AddressGuard:
    """A downloader middleware of Scrapy's. It counts what it refuses."""

    def __init__(self, crawler: Any) -> None:
        self._stats = crawler.stats
        self._networks = Networks.of(crawler.settings)

    @classmethod
    def from_crawler(cls, crawler: Any) -> AddressGuard:
        return cls(crawler)

    async def process_request(self, request: Any) -> None:
        """Raises RefusedAddress, which ends the request."""
        address = urlsplit(request.url)
        host = address.hostname
        if address.scheme not in {"http", "https"} or not host or address.username:
            self._refuse(request.url, "not an address of a page")
        elif request.meta.get("proxy") or _is_number(host):  # aiohttp resolves no number and asks a proxy by name
            for found in await _resolved(host, address.port or 0):
                if found not in self._networks:
                    self._refuse(request.url, f"{found} is no public address")

    def _refuse(self, url: str, reason: str) -> None:
        self._stats.inc_value("calpaca/refused_addresses")
        raise RefusedAddress(f"{url} is not asked: {reason}")


def _is_number(host: str) -> bool:
    """Whether a host is an address itself, in any of the ways in which a system reads one: 127.1, 0x7f000001 …"""
    return ":" in host or host.rpartition(".")[2][:1].isdigit()


async def _resolved(host: str, port: int) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []  # the request fails for this reason by itself
    return [str(entry[4][0]) for entry in found]
