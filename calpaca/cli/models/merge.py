"""`calpaca models merge`: adapters into a base."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.models.command import current_command
from calpaca.cli.run import shared_runtime
from calpaca.cli.size import SIZE
from calpaca.cli.table import size
from calpaca.core.errors import UsageError

if TYPE_CHECKING:
    from calpaca.core.merge import MergePlan
    from calpaca.core.runtime import Runtime
    from calpaca.core.spec import ModelSpec

_SHOWN = 10  # tensors that change their shape; more are counted


@click.command()
@click.argument("name")
@click.option(
    "--adapter", "adapters", multiple=True, required=True, metavar="PATH",
    help="LoRA adapter to merge; repeat for several, in order. PATH@0.5 halves its strength.",
)  # fmt: skip
@click.option("--output", "-o", type=click.Path(path_type=Path), help="The folder to write. Needed but for --dry-run.")
@click.option(
    "--format", "file_format", type=click.Choice(["safetensors", "bin", "pth"]), default="safetensors",
    show_default=True, help="safetensors or pytorch_model.bin; pth is the original LLaMA layout.",
)  # fmt: skip
@click.option("--shard-size", type=SIZE, default="5GB", show_default=True, help="Most bytes of a file of weights.")
@click.option("--parts", type=click.IntRange(min=1), default=1, show_default=True, help="Files of --format pth.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type to load the base in. Default: as it is stored.",
)  # fmt: skip
@click.option(
    "--accumulate", type=click.Choice(["compat", "fp32"]), default="compat", show_default=True,
    help="compat rounds after each adapter, bit for bit as PEFT does; fp32 once, after the last.",
)  # fmt: skip
@click.option("--tokenizer", metavar="TEXT", help="Folder or id of another tokenizer to take along.")
@click.option("--chat-template", metavar="TEXT", help="Name of a built-in chat template, or a Jinja file.")
@click.option("--revision", metavar="TEXT", help="Branch, tag or commit of the base on the hub.")
@click.option("--force", is_flag=True, help="Merge against what manifests record of order, parents and bases.")
@click.option("--verify", is_flag=True, help="Compare base and adapters with the result; exit code 1 if they differ.")
@click.option("--dry-run", is_flag=True, help="Print the plan and its problems; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def merge(
    name: str, *, adapters: tuple[str, ...], tokenizer: str | None, chat_template: str | None, revision: str | None,
    output: Path | None, verify: bool, dry_run: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Merge LoRA adapters into a base, in order, and print the folder that was written.

    Weights are read and written tensor by tensor. A merge that was interrupted goes on when the same command is given
    again.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's: large pages, so that gigabytes are read sooner
    from calpaca.core.files import find_files
    from calpaca.core.merge import MergeOptions, plan_merge
    from calpaca.core.merge import merge as write_merged
    from calpaca.core.spec import AdapterSpec, ModelSpec

    runtime = shared_runtime()
    chosen = tuple(AdapterSpec.model_validate(adapter) for adapter in adapters)
    given = {"tokenizer": tokenizer, "chat_template": chat_template, "revision": revision}
    changes = {key: value for key, value in given.items() if value is not None}
    spec = runtime.spec(ModelSpec(model=name, adapters=chosen, **changes))
    plan = plan_merge(find_files(spec, runtime), output, MergeOptions(format=options.pop("file_format"), **options))
    for note in plan.notes:
        click.echo(f"calpaca: {note}", err=True)
    if dry_run:
        _print_plan(plan, as_json)
        raise SystemExit(1 if plan.problems else 0)
    if output is None:
        raise UsageError("It is not said where to write.", "Add --output DIR, or --dry-run to see what it would be.")
    manifest = write_merged(plan, runtime.jobs, current_command())
    answer = {"output": str(output), "weights": manifest.weights, "files": list(manifest.files)}
    click.echo(json.dumps(answer, ensure_ascii=False, indent=2) if as_json else output)
    if verify and not _verified(spec, output, runtime):
        raise SystemExit(1)


def _print_plan(plan: MergePlan, as_json: bool) -> None:
    content = plan.to_dict()
    if as_json:
        click.echo(json.dumps(content, ensure_ascii=False, indent=2))
        return
    for kind, count in content["operations"].items():
        click.echo(f"{count:>5}  {kind}")
    reshaped = list(content["reshaped"].items())
    for name, shapes in reshaped[:_SHOWN]:
        before = list(shapes["before"]) if shapes["before"] is not None else "tied"
        click.echo(f"{name}  {before} -> {list(shapes['after'])}")
    if len(reshaped) > _SHOWN:
        click.echo(f"and {len(reshaped) - _SHOWN} more")
    for name, count in content["files"].items():
        click.echo(f"{name}  {size(count)}")
    click.echo(f"memory  {size(content['memory'])} beside the program's own")
    click.echo(f"disk    {size(content['disk_needed'])} needed, {size(content['disk_free'])} free")
    for problem in content["problems"]:
        click.echo(f"problem {problem['message']} {problem['hint']}")


def _verified(spec: ModelSpec, output: Path, runtime: Runtime) -> bool:
    """Whether the merged model computes what base and adapters do; says on stderr what was found."""
    from calpaca.core.compare import CompareOptions, compare
    from calpaca.core.spec import ModelSpec

    result = compare(spec, ModelSpec(model=str(output)), runtime, CompareOptions(new_tokens=0, tensors=False))
    idle = [f"Adapter {name} changes no logit: it has no effect." for name in result.idle]
    click.echo(
        f"calpaca: merged and unmerged logits differ by at most {result.relative:.2e} of the largest; the likeliest token"
        f" is the same at {result.agreement:.1%} of the positions.",
        err=True,
    )
    for problem in (*result.problems, *idle):
        click.echo(f"calpaca: {problem}", err=True)
    return result.within_tolerance and not idle
