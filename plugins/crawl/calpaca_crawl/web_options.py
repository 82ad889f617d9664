"""What `calpaca crawl web` is told."""

from __future__ import annotations

import re
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from calpaca.plugins.options import Flag


class WebOptions(BaseModel):
    """The options, beside the start addresses."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: Path = Field(Path("corpus"), description="Folder for the documents; the report stands beside it.")
    form: Literal["jsonl", "markdown"] = Field("jsonl", description="documents.jsonl, or a Markdown file per page.")
    sitemap: bool = Field(False, description="Begin with the pages of each site's sitemap too.")
    domains: Annotated[list[str], Flag("domain")] = Field(
        [], description="Domain whose pages are followed, with those below it; repeat. Left out: the start addresses'."
    )
    include: list[str] = Field([], description="Regular expression that addresses must match; repeat, one is enough.")
    exclude: list[str] = Field([], description="Regular expression of addresses that are left out; repeat.")
    depth: int = Field(5, ge=0, description="Links that are followed one after the other.")
    max_pages: int = Field(1000, ge=1, description="Stop after so many pages.")
    max_time: float | None = Field(None, gt=0, description="Stop after so many seconds.")
    max_megabytes: float = Field(10.0, gt=0, description="Size of a page or PDF that is read.")
    timeout: float = Field(30.0, gt=0, description="Seconds for one page.")
    delay: float = Field(0.5, ge=0, description="Seconds between two requests to one host.")
    per_host: int = Field(4, ge=1, description="Requests to one host at once.")
    in_flight: int = Field(16, ge=1, description="Requests at once.")
    retries: int = Field(2, ge=0, description="How often a page that fails for a passing reason is tried again.")
    user_agent: str = Field("calpaca-crawl", description="Name by which the crawler calls itself, also to robots.txt.")
    robots: bool = Field(True, description="Keep to robots.txt.")
    networks: Annotated[list[str], Flag("allow-network")] = Field(
        [], description="Network that is not public and may be asked, such as 192.168.1.0/24 or 127.0.0.1; repeat."
    )
    browser: bool = Field(False, description="Let a headless Chromium render pages that need JavaScript; slow.")
    pdf: bool = Field(True, description="Keep PDFs.")
    shortest: int = Field(100, ge=0, description="Characters of a page's text, at the least.")
    similarity: float = Field(0.9, gt=0, le=1, description="ROUGE-L from which on a page is a duplicate of another.")
    cache: bool = Field(True, description="Ask again only for pages that have changed since an earlier crawl.")
    scrapy: list[str] = Field([], description="Setting of Scrapy's, as NAME=VALUE; repeat. See docs/crawl.md.")
    overwrite: bool = Field(False, description="Replace a folder that is there.")

    @field_validator("networks")
    @classmethod
    def _are_networks(cls, networks: list[str]) -> list[str]:
        return [str(ip_network(network, strict=False)) for network in networks]

    @field_validator("scrapy")
    @classmethod
    def _are_settings(cls, settings: list[str]) -> list[str]:
        for setting in settings:
            if not re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", setting, re.DOTALL):
                raise ValueError(f"{setting!r} is not written as NAME=VALUE")
        return settings

    @field_validator("include", "exclude")
    @classmethod
    def _are_patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"no regular expression: {error}") from error
        return patterns
