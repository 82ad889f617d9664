"""`calpaca models merge` as a person types it, on the real SmolLM2."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from calpaca.core.checkpoint.manifest import read_manifest  # noqa: E402
from calpaca.core.checkpoint.reader import open_checkpoint  # noqa: E402
from calpaca.core.checkpoint.verify import verify  # noqa: E402

PREFIX = "base_model.model."


def write_adapter(folder: Path, base: Path, *, seed: int, rows: int | None = None) -> Path:
    """A LoRA adapter on the projections of the attention; `rows` makes it bring embeddings of that length."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: stored.shape for name, stored in open_checkpoint(base).tensors.items()}
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            module = PREFIX + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn(8, shape[1], generator=generator) * 0.05
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], 8, generator=generator) * 0.05
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    if rows is not None:
        embeddings = torch.randn(rows, shapes["model.embed_tokens.weight"][1], generator=generator) * 0.1
        tensors |= {f"{PREFIX}{name}.weight": embeddings.clone() for name in ("model.embed_tokens", "lm_head")}
        config["modules_to_save"] = ["embed_tokens", "lm_head"]
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def adapter(tmp_path: Path, smollm2: Path) -> Path:
    return write_adapter(tmp_path / "adapter", smollm2, seed=1)


def test_a_merged_model_is_verified_and_computes_what_base_and_adapter_do(
    calpaca, smollm2: Path, adapter: Path
) -> None:
    result = calpaca("models", "merge", str(smollm2), "--adapter", f"{adapter}@0.5", "--output", "merged", "--verify")
    assert (result.code, result.out) == (0, "merged\n"), result.err
    assert "likeliest token is the same at 100.0% of the positions" in result.err
    assert calpaca("models", "verify", "merged").code == 0
    manifest = read_manifest(Path("merged"))
    assert manifest is not None
    assert manifest.lineage.inputs[1].scale == 0.5
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert Path("merged", name).read_bytes() == (smollm2 / name).read_bytes()
    again = calpaca("models", "merge", str(smollm2), "--adapter", str(adapter), "--output", "merged")
    assert (again.code, again.out) == (2, "")
    assert "merged exists already" in again.err


def test_a_result_outside_the_tolerance_fails(calpaca, smollm2: Path, adapter: Path, monkeypatch) -> None:
    from calpaca.core import compare

    stricter = compare.CompareOptions(prompts=("The llama is",), tolerance=0.0, new_tokens=0, tensors=False)
    monkeypatch.setattr(compare, "CompareOptions", lambda **_: stricter)
    result = calpaca(
        "models",
        "merge",
        str(smollm2),
        "--adapter",
        str(adapter),
        "--output",
        "merged",
        "--dtype",
        "float16",
        "--verify",
    )
    assert result.code == 1
    assert "the tolerance is 0" in result.err


def test_a_dry_run_prints_the_plan_and_writes_nothing(calpaca, smollm2: Path, adapter: Path, tmp_path: Path) -> None:
    longer = write_adapter(tmp_path / "longer", smollm2, seed=2, rows=49160)
    before = sorted(tmp_path.iterdir())
    arguments = ("models", "merge", str(smollm2), "--adapter", str(adapter), "--adapter", str(longer), "--dry-run")
    told = calpaca(*arguments, "--output", "merged")
    assert told.code == 0, told.err
    assert "60  LoRA\n" in told.out
    assert "2  replaced\n" in told.out
    assert "model.embed_tokens.weight  [49152, 576] -> [49160, 576]\n" in told.out
    assert "lm_head.weight  tied -> [49160, 576]\n" in told.out
    assert "needed" in told.out
    assert "8 of the 49160 embedding rows have no token" in told.err
    plan = calpaca(*arguments, "--json").json
    assert (plan["tied"], plan["problems"], plan["output"]) == (False, [], None)
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_with_problems_fails_and_lists_them(calpaca, smollm2: Path, adapter: Path, tmp_path: Path) -> None:
    command = ("models", "merge", str(smollm2), "--adapter", str(adapter), "--adapter", str(adapter))
    told = calpaca(*command, "--dry-run")
    assert told.code == 1
    assert "problem Adapter adapter is given twice. Give it once. --force merges all the same." in told.out
    result = calpaca(*command, "--output", "merged")
    assert (result.code, result.out) == (3, "")
    assert "calpaca: Adapter adapter is given twice.\n" in result.err
    assert not (tmp_path / "merged").exists()
    forced = calpaca(*command, "--dry-run", "--force")
    assert (forced.code, "merged all the same" in forced.err) == (0, True)


def test_the_right_order_is_printed_as_a_command(calpaca, smollm2: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "plus", smollm2, seed=1, rows=49160)
    write_adapter(tmp_path / "alpaca", smollm2, seed=2, rows=49161)
    result = calpaca(
        "models", "merge", str(smollm2), "--adapter", "alpaca", "--adapter", "plus@1", "--output", "merged"
    )
    assert result.code == 3
    assert f"Type: calpaca models merge {smollm2} --adapter plus --adapter alpaca --output merged\n" in result.err


def test_wrong_use(calpaca, smollm2: Path, adapter: Path) -> None:
    assert calpaca("models", "merge", str(smollm2), "--output", "merged").code == 2
    assert "not said where to write" in calpaca("models", "merge", str(smollm2), "--adapter", str(adapter)).err
    none = calpaca("models", "merge", str(smollm2), "--adapter", "./nowhere", "--output", "merged")
    assert (none.code, "nowhere does not exist" in none.err) == (3, True)


def test_a_tokenizer_that_is_given_as_a_file_is_answered_with_its_folder(calpaca, smollm2: Path, adapter: Path) -> None:
    file = smollm2 / "tokenizer.json"
    told = calpaca("models", "merge", str(smollm2), "--adapter", str(adapter), "--tokenizer", str(file), "--dry-run")
    assert told.code == 3
    assert f"Name the folder it lies in: {smollm2}" in told.err


MEMORY = """
import sys
from pathlib import Path
from calpaca.cli.main import main

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

main([*sys.argv[1:], "--dry-run"])  # imports everything
before = peak()
assert main(sys.argv[1:]) == 0
print(peak() - before, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not say what memory a process has")
def test_a_merge_takes_the_memory_of_a_few_tensors(smollm2: Path, adapter: Path, tmp_path: Path) -> None:
    """The base has 269 MB, the largest tensor that is computed 0.7 MB."""
    command = ["models", "merge", str(smollm2), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    ended = subprocess.run([sys.executable, "-c", MEMORY, *command], capture_output=True, text=True, check=True)
    assert int(ended.stderr.split()[-1]) < 60_000  # kB


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX thing")
def test_a_merge_that_is_killed_goes_on_and_ends_with_the_same_bytes(
    smollm2: Path, adapter: Path, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    command = [sys.executable, "-m", "calpaca", "models", "merge", str(smollm2), "--adapter", str(adapter)]
    command += ["--shard-size", "5MB", "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    kept = [0]
    for _ in range(4):
        process = subprocess.Popen([*command, str(tmp_path / "killed")])
        wanted = kept[-1] + chance.randrange(1, 8)
        while process.poll() is None and shards(tmp_path) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(shards(tmp_path))
    print(f"files there after each kill: {kept}")
    assert kept == sorted(kept)
    assert kept[-1] > 3
    assert not (tmp_path / "killed").exists()
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {file.name for file in (tmp_path / "killed").iterdir()} == names
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert verify(tmp_path / "killed").passed


def shards(folder: Path) -> int:
    """Files that the merge under way has finished."""
    return len(list(folder.glob(".killed.partial/*.safetensors")))
