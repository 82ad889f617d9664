"""`calpaca models export`: a model or adapter for llama.cpp and Ollama, or as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calpaca.cli.models.command import current_command
from calpaca.cli.run import shared_runtime
from calpaca.cli.size import SIZE
from calpaca.core.errors import UsageError

if TYPE_CHECKING:
    from calpaca.core.files import ModelFiles
    from calpaca.core.runtime import Runtime
    from calpaca.core.spec import ModelSpec


@click.command()
@click.argument("name")
@click.option(
    "--format", "form", type=click.Choice(["gguf", "hf"]), default="gguf", show_default=True,
    help="A GGUF file, or a Hugging Face folder.",
)  # fmt: skip
@click.option(
    "--type", "kind", metavar="TEXT",
    help="Number format of a GGUF file: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; q4_k_m and the like need"
    " llama.cpp's llama-quantize on the PATH. Default: f16, and f32 for an adapter.",
)  # fmt: skip
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="PATH",
    help="LoRA adapter to merge into the export; repeat for several, in order.",
)  # fmt: skip
@click.option("--base", metavar="TEXT", help="The base, where NAME is an adapter that is exported by itself.")
@click.option("--pre", metavar="TEXT", help="llama.cpp's name of the pre-tokenizer, where it is not recognised.")
@click.option("--tokenizer", metavar="TEXT", help="Folder or id of another tokenizer to take along.")
@click.option("--chat-template", metavar="TEXT", help="Name of a built-in chat template, or a Jinja file.")
@click.option("--revision", metavar="TEXT", help="Branch, tag or commit of the model on the hub.")
@click.option("--shard-size", type=SIZE, default="5GB", show_default=True, help="Most bytes of a file of --format hf.")
@click.option(
    "--logits/--no-logits", default=True, show_default=True,
    help="Run source and GGUF file on a few prompts and compare, where they fit in memory.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export(
    name: str, *, form: str, kind: str | None, output: Path, base: str | None, as_json: bool, **options: Any
) -> None:
    """Export a model for llama.cpp and Ollama, and print the folder that was written.

    NAME is a folder, a name of `calpaca models list`, a hub id or a .gguf file. What was written is read back and
    compared with the source first; if it differs, no output appears. With --base, NAME is a LoRA adapter.
    """
    runtime = shared_runtime()
    if base is not None:
        answer = _adapter(
            name, base, kind=(kind or "f32").lower(), form=form, output=output, options=options, runtime=runtime
        )
    elif (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        raise UsageError(
            f"{name} is a LoRA adapter, and it is not said for which base.",
            f"Add --base MODEL for a file of its own, or merge it in: calpaca models export MODEL --adapter {name}"
            f" --output {output}",
        )
    elif form == "hf":
        answer = _hugging_face(name, kind, output, options)
    else:
        answer = _gguf(name, kind or "f16", output, options, runtime)
    click.echo(json.dumps({"output": str(output), **answer}, ensure_ascii=False, indent=2) if as_json else output)


def _gguf(name: str, kind: str, output: Path, options: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
    from calpaca.core.export.gguf_export import GgufOptions, export_gguf

    files = _files(name, options["adapters"], options, runtime)
    chosen = GgufOptions(kind.lower(), options["pre"], options["logits"])
    manifest, check = export_gguf(files, output, runtime.jobs, chosen, current_command())
    click.echo(f"calpaca: {check}", err=True)
    compared = {"texts": check.texts, "relative": check.relative, "agreement": check.agreement, "reason": check.reason}
    return {"files": list(manifest.files), "weights": manifest.weights, "tensors": check.tensors, **compared}


def _adapter(
    name: str, base: str, *, kind: str, form: str, output: Path, options: dict[str, Any], runtime: Runtime
) -> dict[str, Any]:
    from calpaca.core.export.lora import export_lora

    if form != "gguf" or options["adapters"]:
        raise UsageError(
            "With --base, NAME is the adapter that is exported, as GGUF.", "Leave --adapter and --format hf away."
        )
    files = _files(base, (name,), options, runtime)
    manifest, count = export_lora(files, output, runtime.jobs, base_name=base, kind=kind, command=current_command())
    click.echo(f"calpaca: {count} tensors read back.", err=True)
    return {"files": list(manifest.files), "weights": manifest.weights, "tensors": count}


def _hugging_face(name: str, kind: str | None, output: Path, options: dict[str, Any]) -> dict[str, Any]:
    from calpaca.core.checkpoint.write import write_model
    from calpaca.core.export.hugging_face import plan_hugging_face

    if kind is not None:
        raise UsageError("--type is for GGUF files.", "Use calpaca models convert --dtype for a Hugging Face folder.")
    if options["adapters"]:
        adapters = " ".join(f"--adapter {adapter}" for adapter in options["adapters"])
        raise UsageError(
            "A Hugging Face folder is written from one model.",
            f"Merge the adapters: calpaca models merge {name} {adapters} --output {output}",
        )
    runtime = shared_runtime()
    plan = plan_hugging_face(_found(name, options, runtime), shard_size=options["shard_size"])
    manifest = write_model(plan, output, runtime.jobs, current_command())
    return {"files": list(manifest.files), "weights": manifest.weights, "tensors": len(manifest.tensors)}


def _found(name: str, options: dict[str, Any], runtime: Runtime) -> Path:
    from calpaca.core.sources import resolve_model

    path = Path(name).expanduser()
    return path if path.exists() else resolve_model(name, runtime, revision=options["revision"]).path


def _files(model: str, adapters: tuple[str, ...], options: dict[str, Any], runtime: Runtime) -> ModelFiles:
    from calpaca.core.files import find_files

    return find_files(_spec(model, adapters, options, runtime), runtime)


def _spec(model: str, adapters: tuple[str, ...], options: dict[str, Any], runtime: Runtime) -> ModelSpec:
    from calpaca.core.spec import AdapterSpec, ModelSpec

    chosen = tuple(AdapterSpec.model_validate(adapter) for adapter in adapters)
    given = {key: options[key] for key in ("tokenizer", "chat_template", "revision")}
    changes = {key: value for key, value in given.items() if value is not None}
    return runtime.spec(ModelSpec(model=model, adapters=chosen, **changes))
