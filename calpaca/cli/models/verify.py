"""`calpaca models verify`: whether files are what is written about them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from calpaca.core.checkpoint.verify import Finding

_SHOWN = 5  # tensors of one file; more are counted


@click.command()
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--against", type=click.Path(path_type=Path, exists=True), metavar="PATH",
    help="A list in the form of sha256sum, or a manifest of the same weights in another container, or its folder."
    " Default: the folder's own manifest.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(path: Path, against: Path | None, as_json: bool) -> None:
    """Read every byte of a model and compare it with its manifest, naming damaged files and tensors.

    Exit code 0 when all is as it should be, 1 when not.
    """
    from calpaca.core.checkpoint.verify import verify as verify_model

    result = verify_model(path, against)
    if as_json:
        click.echo(json.dumps({"passed": result.passed, **asdict(result)}, ensure_ascii=False, indent=2))
    elif result.passed:
        counted = [f"{result.files} files"] * bool(result.files) + [f"{result.tensors} tensors"] * bool(result.tensors)
        click.echo(f"{path} is as {result.against} says: {' and '.join(counted)}.")
    else:
        for finding in result.findings:
            click.echo(_line(finding))
    if not result.passed:
        raise SystemExit(1)


def _line(finding: Finding) -> str:
    names = finding.tensors
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{finding.file} {finding.problem}{': ' if names else ''}{', '.join(names[:_SHOWN])}{rest}"
