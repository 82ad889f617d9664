"""`calpaca models compare`: whether two models compute the same."""

from __future__ import annotations

import json
from math import inf
from typing import TYPE_CHECKING

import click

from calpaca.cli.run import shared_runtime

if TYPE_CHECKING:
    from calpaca.core.compare import Comparison
    from calpaca.core.compare.tensors import TensorDifference
    from calpaca.core.spec import ModelSpec

_SHOWN = 10  # tensors; more are counted


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--adapter", "adapters", multiple=True, metavar="PATH", help="LoRA adapter on A; repeat, in order.")
@click.option("--other-adapter", "others", multiple=True, metavar="PATH", help="LoRA adapter on B; repeat, in order.")
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Instead of the built-in ones, up to 256 tokens; repeat."
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0), metavar="NUMBER",
    help="Largest difference of logits, in parts of the largest logit. Default: by the coarsest number format that is"
    " computed in or stored: float32 0.001, float16 0.01, bfloat16 and Q8_0 0.1, 8bit 0.2, others 1.",
)  # fmt: skip
@click.option(
    "--max-new-tokens", type=click.IntRange(min=0), default=32, show_default=True, metavar="INTEGER",
    help="How far greedy answers are followed.",
)  # fmt: skip
@click.option("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda, cuda:0 or cuda:0,1.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
    help="Type to compute both in; float32 shows the smallest differences.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(
    a: str, b: str, *, adapters: tuple[str, ...], others: tuple[str, ...], prompts: tuple[str, ...],
    tolerance: float | None, max_new_tokens: int, device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Compare what two models compute: logits, greedy answers and tensors. One is in memory at a time.

    Exit code 0 when they are the same within the tolerance, 1 when not.
    """
    from calpaca.core.compare import CompareOptions
    from calpaca.core.compare import compare as compare_models

    options = CompareOptions(prompts, tolerance, max_new_tokens)
    one, other = (_spec(name, chosen, device, dtype) for name, chosen in ((a, adapters), (b, others)))
    result = compare_models(one, other, shared_runtime(), options)
    if as_json:
        click.echo(json.dumps(result.to_dict(), ensure_ascii=False, indent=2))
    else:
        _print(result)
    if not result.within_tolerance:
        raise SystemExit(1)


def _spec(name: str, adapters: tuple[str, ...], device: str, dtype: str) -> ModelSpec:
    from calpaca.core.spec import AdapterSpec, ModelSpec

    chosen = tuple(AdapterSpec.model_validate(adapter) for adapter in adapters)
    return ModelSpec(model=name, adapters=chosen, device=device, dtype=dtype)


def _print(result: Comparison) -> None:
    click.echo(f"A  {result.a} ({result.dtype_a}, {result.rows_a:,} logits)")
    click.echo(f"B  {result.b} ({result.dtype_b}, {result.rows_b:,} logits)\n")
    click.echo(
        f"Largest logit difference  {result.largest:.4g}, {result.relative:.2e} of the largest logit"
        f" ({result.scale:.3g}); tolerance {result.tolerance:g}"
    )
    click.echo(f"Mean logit difference     {result.mean:.4g}")
    agreeing = sum(prompt.agreeing for prompt in result.prompts)
    click.echo(f"Same likeliest token      {agreeing} of {result.positions} positions ({result.agreement:.1%})")
    _print_answers(result)
    _print_tensors(result)
    for line in _remarks(result):
        click.echo(line)


def _print_answers(result: Comparison) -> None:
    parted = [prompt for prompt in result.prompts if prompt.parts_at is not None]
    click.echo(f"Same greedy answer        {len(result.prompts) - len(parted)} of {len(result.prompts)} prompts")
    for prompt in parted:
        click.echo(f"  after {prompt.prompt[-40:]!r} they part at token {prompt.parts_at}")
        click.echo(f"    A {prompt.greedy_a!r}\n    B {prompt.greedy_b!r}")


def _print_tensors(result: Comparison) -> None:
    if result.tensors is None:
        return
    differences = result.tensors.differences
    click.echo(f"Same tensors              {result.tensors.equal} of {result.tensors.equal + len(differences)}")
    by_size = sorted(differences, key=lambda each: inf if each.largest is None else each.largest, reverse=True)
    for difference in by_size[:_SHOWN]:
        click.echo(f"  {_tensor_line(difference)}")
    if len(differences) > _SHOWN:
        click.echo(f"  and {len(differences) - _SHOWN} more")


def _tensor_line(difference: TensorDifference) -> str:
    sides = f"A has {difference.a}, B has {difference.b}" if difference.a != difference.b else difference.a
    return f"{difference.name}: {sides}" + (
        f", largest difference {difference.largest:.4g}" if difference.largest is not None else ""
    )


def _remarks(result: Comparison) -> list[str]:
    """What the numbers alone do not say."""
    remarks = [] if result.within_tolerance else ["", *result.problems]
    if result.rows_a != result.rows_b:
        remarks.append(f"The vocabularies differ: the {result.ids:,} ids that both have are compared.")
    if not result.same_template:
        remarks.append("The chat templates differ, which logits say nothing of.")
    remarks += [f"Adapter {name} changes no logit: it has no effect." for name in result.idle]
    if result.identical:
        remarks.append("All logits are identical.")
    return remarks
