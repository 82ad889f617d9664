"""`calpaca crawl web`: the pages of websites as documents."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from calpaca.cli.flags import flags, group_of
from calpaca.cli.run import AppCommand, answers_only, shared_runtime, was_typed
from calpaca.core.errors import JobError, UsageError
from calpaca.plugins.options import read_options
from calpaca_crawl.web_options import WebOptions


@click.pass_context
def _web(ctx: click.Context, /, starts: tuple[str, ...], **values: Any) -> None:
    typed = {name: value for name, value in values.items() if was_typed(ctx, name)}
    as_json = typed.pop("_json", False)
    options = read_options(WebOptions, typed, "crawl web")
    assert isinstance(options, WebOptions)
    for url in starts:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"'{url}' is no address of a website.", "Write it as https://example.org/")
    with answers_only() as out:
        figures = collect(starts, options)
        out.write(json.dumps(figures, ensure_ascii=False) if as_json else str(options.output))
        out.write("\n")


def collect(starts: tuple[str, ...], options: WebOptions) -> dict[str, Any]:
    """Crawl into the options' folder, and give the report's figures. Raises CalpacaError."""
    from tqdm import tqdm

    from calpaca.core.jobs import JobCancelled
    from calpaca_crawl.site_spider import KIND
    from calpaca_crawl.web_crawl import begun, check_browser, check_output, crawl, write_report

    if options.browser:
        check_browser()
    ledger = shared_runtime().jobs
    what = {"starts": list(starts), "options": options.model_dump(mode="json", exclude={"overwrite"})}
    started = begun(ledger, KIND, what)
    argv = list(click.get_current_context().obj or ())
    parameters = {**what, "begun": started, "argv": argv, "cwd": str(Path.cwd())}
    job = ledger.start(KIND, f"Crawl {starts[0]}", parameters)
    with job, tqdm(unit=" page", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:
        check_output(options, resumed=False)

        def progress(spider: Any) -> None:
            stats = spider.crawler.stats.get_stats()
            waiting = stats.get("scheduler/enqueued", 0) - stats.get("scheduler/dequeued", 0)
            bar.update(job.done - bar.n)
            bar.set_postfix(queue=waiting, errors=sum(count for name, count in stats.items() if "/failed/" in name))

        try:
            figures = crawl(starts, options, job, started, progress)
        except KeyboardInterrupt:
            raise JobCancelled(
                "Cancelled; what is read is kept.", f"Go on with: calpaca jobs resume {job.id}"
            ) from None
        write_report(figures, options.output)
        if not figures["documents"]:
            raise _nothing_found(figures, options)
    click.echo(
        f"{figures['documents']} documents of {figures['pages']} pages ({figures['near_duplicates']} near-duplicates, "
        f"{figures['too_short']} too short left out), {sum(figures['failed'].values())} failed; {figures['seconds']} s.",
        err=True,
    )
    return figures


def _nothing_found(figures: dict[str, Any], options: WebOptions) -> JobError:
    from calpaca_crawl.web_crawl import report_path

    if figures["refused_addresses"]:
        return JobError(
            "No page was asked for: private and local addresses are refused.",
            "Allow a network of your own, such as --allow-network 192.168.1.0/24 or --allow-network 127.0.0.1.",
        )
    return JobError(
        f"No page with text was found: {figures['failed'] or figures['statuses']}.",
        f"See {report_path(options.output)}.",
    )


_STARTS = click.Argument(["starts"], nargs=-1, required=True, metavar="URL...")
_JSON = click.Option(["_json", "--json"], is_flag=True, help="Print the report as one JSON object.")

web = AppCommand(
    "web",
    params=[_STARTS, *flags("crawl web", WebOptions), _JSON],
    callback=_web,
    help="""Collect the pages of websites as documents.

    From the start addresses along their links, within their domains. Each page's main text, title, date and language go to
    documents.jsonl in the folder --output, PDFs beside it; `calpaca run retrieval_qa --file corpus` reads both. A crawl
    that was killed goes on where it ended: give the same command again.
    """,
    groups={name: group_of(WebOptions, name) for name in WebOptions.model_fields},
)
