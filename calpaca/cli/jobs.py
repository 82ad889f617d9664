"""`calpaca jobs`: long runs, why they stand where they stand, and going on with them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import chdir
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.group import Group
from calpaca.cli.run import resume_job, shared_runtime
from calpaca.cli.table import table
from calpaca.core.errors import JobError

if TYPE_CHECKING:
    from calpaca.core.jobs import JobRecord


@click.group(cls=Group)
def jobs() -> None:
    """List, explain and resume long runs."""


@jobs.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list_jobs(as_json: bool) -> None:
    """List all jobs, the newest first."""
    records = shared_runtime().jobs.jobs()
    if as_json:
        click.echo(json.dumps([asdict(record) for record in records], ensure_ascii=False, indent=2))
    elif records:
        rows = [(record.id, record.kind, record.state, _count(record), _time(record.updated), record.title)
                for record in records]  # fmt: skip
        click.echo(table(("ID", "APP", "STATE", "DONE", "UPDATED", "TITLE"), rows))
    else:
        click.echo("No jobs yet.", err=True)


@jobs.command()
@click.argument("job_id")
def why(job_id: str) -> None:
    """Explain a job: its state, what was done and what it was started with."""
    record = shared_runtime().jobs.get(job_id)
    click.echo(f"Job {record.id}: {record.title}")
    click.echo(f"{record.state.capitalize()} since {_time(record.updated)}, begun {_time(record.created)}.")
    click.echo(f"{_count(record)} steps done, {record.reused} of them taken from earlier runs.")
    if record.message:
        click.echo(record.message)
    if record.state in {"interrupted", "failed", "cancelled"}:
        click.echo(f"Go on with: calpaca jobs resume {record.id}")
    if record.parameters.get("argv"):
        click.echo(f"\nStarted in {record.parameters['cwd']} as: calpaca {shlex.join(record.parameters['argv'])}")
        return
    click.echo(f"\nStarted as: calpaca run {record.kind}, with")
    for name, value in sorted(record.parameters.items()):
        click.echo(f"  {name} = {json.dumps(value, ensure_ascii=False)}")


@jobs.command()
@click.argument("job_id")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def resume(job_id: str, as_json: bool) -> None:
    """Go on with a job; finished steps are not done again. A unique beginning of the id is enough."""
    runtime = shared_runtime()
    record = runtime.jobs.get(job_id)
    if "argv" in record.parameters:
        rerun(record.parameters)
        return
    resume_job(record, runtime, sys.stdout, as_json=as_json)


def rerun(parameters: Mapping[str, Any]) -> None:
    """Give a command again, in the folder it was given in."""
    from calpaca.cli.main import program

    if not parameters.get("argv"):
        raise JobError(
            "This job was started from Python, or read its input from a pipe.",
            "Start it again in the same way; it goes on from there.",
        )
    if not Path(parameters["cwd"]).is_dir():
        raise JobError(f"The job was started in {parameters['cwd']}, which is gone.", "Give the command again.")
    with chdir(parameters["cwd"]):
        program.main(list(parameters["argv"]), standalone_mode=False, obj=tuple(parameters["argv"]))


def _count(record: JobRecord) -> str:
    return f"{record.done}/{record.total}" if record.total is not None else str(record.done)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")  # local time, as a person reads it
