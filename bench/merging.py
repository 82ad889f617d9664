"""Merging: `calpaca models merge` beside `cp` + sha256 of the base, and beside PEFT's merge_and_unload.

Run: python bench/merging.py [--shape 7b|1b] [--rounds 3] [--peft] [--folder DIR]

Makes a base of random bfloat16 weights and an adapter of rank 64 on the seven linear layers with a longer vocabulary,
then runs each way in a process of its own, in turns, and deletes each output. Prints wall time and peak resident
memory (`ru_maxrss`) of every run, the medians, and their ratios. 7b needs 27 GB of disk beside the base; `--peft`
loads the whole model.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from calpaca.core.checkpoint.plan import PlannedTensor

RANK = 64
ADDED = 17_954  # tokens that the adapter brings: 32,000 become 49,954, as in Chinese-Alpaca
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
}


# What is merged, made in a process of its own: a process inherits its parent's peak of memory ---------------------------
@functools.cache
def block() -> torch.Tensor:
    import torch

    return torch.randn(50_000_000, generator=torch.Generator().manual_seed(0)) * 0.02


def noise(*shape: int, dtype: str = "bfloat16") -> torch.Tensor:
    """Random values of this shape: one block of noise, repeated from a place that the shape gives."""
    import torch

    count = 1
    for length in shape:
        count *= length
    start = count % 9973
    times = -(-(start + count) // len(block()))
    repeated = block().repeat(times) if times > 1 else block()
    return repeated[start : start + count].reshape(shape).to(getattr(torch, dtype))


def linear_layers(shape: dict[str, int]) -> dict[str, tuple[int, int]]:
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    sizes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    sizes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    return {
        f"model.layers.{layer}.{name}": size
        for layer in range(shape["num_hidden_layers"])
        for name, size in sizes.items()
    }


def make_base(folder: Path, shape: dict[str, int], jobs: Path) -> None:
    from calpaca.core.checkpoint.manifest import Lineage
    from calpaca.core.checkpoint.plan import ModelPlan, hugging_face_files
    from calpaca.core.checkpoint.write import write_model
    from calpaca.core.jobs import Ledger

    hidden, rows = shape["hidden_size"], shape.get("vocab_size", 32_000)
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rows, hidden),
        "lm_head.weight": (rows, hidden),
    }
    sizes |= {f"{name}.weight": size for name, size in linear_layers(shape).items()}
    for layer in range(shape["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    sizes["model.norm.weight"] = (hidden,)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows, "dtype": "bfloat16",
              "tie_word_embeddings": False, "rms_norm_eps": 1e-6, **shape}  # fmt: skip
    tensors = [planned(name, size) for name, size in sizes.items()]
    plan = ModelPlan(
        hugging_face_files(tensors), lambda: Lineage("bench", ()), (), {}, {"config.json": json.dumps(config).encode()}
    )
    write_model(plan, folder, Ledger(jobs))


def planned(name: str, size: tuple[int, ...]) -> PlannedTensor:
    from calpaca.core.checkpoint.plan import computed

    return computed(name, "BF16", size, lambda: noise(*size), origin="noise")


def make_adapter(folder: Path, shape: dict[str, int]) -> None:
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.{name}.weight": noise(32_000 + ADDED, shape["hidden_size"], dtype="float16")
        for name in ("model.embed_tokens", "lm_head")
    }
    for name, (rows, columns) in linear_layers(shape).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = noise(RANK, columns, dtype="float16")
        tensors[f"base_model.model.{name}.lora_B.weight"] = noise(rows, RANK, dtype="float16")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in linear_layers(shape)})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 128, "target_modules": targets,
              "modules_to_save": ["embed_tokens", "lm_head"], "base_model_name_or_path": "base"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make(shape: dict[str, int], base: Path, adapter: Path, temporary: Path) -> None:
    if not base.is_dir():
        make_base(base, shape, temporary / "jobs.sqlite")
    if not adapter.is_dir():
        make_adapter(adapter, shape)


# The ways, each run in a process of its own ---------------------------------------------------------------------------
def copy_and_hash(base: Path, _adapter: Path, output: Path) -> None:
    subprocess.run(["cp", "-r", base, output], check=True)
    for file in sorted(output.iterdir()):
        with file.open("rb") as opened:
            hashlib.file_digest(opened, "sha256")


def merge(base: Path, adapter: Path, output: Path) -> None:
    from calpaca.cli.main import main

    assert main(["models", "merge", str(base), "--adapter", str(adapter), "--output", str(output)]) == 0


def merge_with_peft(base: Path, adapter: Path, output: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.resize_token_embeddings(32_000 + ADDED, mean_resizing=False)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)


WAYS = {"cp + sha256": copy_and_hash, "calpaca": merge, "peft": merge_with_peft}


def measure(way: str, base: Path, adapter: Path, output: Path) -> tuple[float, float]:
    """Seconds and peak resident megabytes of one run."""
    arguments = [sys.executable, __file__, "--child", way, str(base), str(adapter), str(output)]
    begin = time.perf_counter()
    told = subprocess.run(
        arguments, check=True, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    seconds = time.perf_counter() - begin
    shutil.rmtree(output)
    return seconds, float(told.stdout.split()[-1])


def child(way: str, base: Path, adapter: Path, output: Path) -> None:
    begin = time.perf_counter()
    WAYS[way](base, adapter, output)
    seconds = time.perf_counter() - begin
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1e3
    print(f"{seconds:.2f} {peak:.0f}")


def interleaved(ways: list[str], rounds: int, paths: tuple[Path, Path, Path]) -> Iterator[tuple[str, float, float]]:
    for number in range(rounds):
        for way in ways:
            seconds, peak = measure(way, *paths)
            print(f"round {number + 1}  {way:12} {seconds:7.1f} s  {peak:7.0f} MB", flush=True)
            yield way, seconds, peak


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], *map(Path, sys.argv[3:6]))
        return
    if sys.argv[1:2] == ["--make"]:
        make(SHAPES[sys.argv[2]], *map(Path, sys.argv[3:6]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peft", action="store_true", help="measure PEFT too")
    parser.add_argument("--folder", type=Path, help="where to keep the base for the next run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        kept = options.folder or Path(temporary)
        base, adapter = kept / f"base-{options.shape}", kept / f"adapter-{options.shape}"
        subprocess.run([sys.executable, __file__, "--make", options.shape, base, adapter, temporary], check=True)
        ways = ["cp + sha256", "calpaca", *["peft"] * options.peft]
        results = list(interleaved(ways, options.rounds, (base, adapter, Path(temporary) / "output")))
    medians = {way: statistics.median(seconds for each, seconds, _ in results if each == way) for way in ways}
    for way in ways:
        peak = max(peak for each, _, peak in results if each == way)
        ratio = medians[way] / medians["cp + sha256"]
        print(f"median   {way:12} {medians[way]:7.1f} s  {peak:7.0f} MB at most  {ratio:.2f} x (cp + sha256)")


if __name__ == "__main__":
    main()
