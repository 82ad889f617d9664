"""Fine-tuning: calpaca beside TRL's SFTTrainer at its defaults and at its best, and beside a plain Trainer.

Run: python bench/training.py [--ways calpaca trl-default …] [--steps 4] [--rounds 2] [--rows 4] [--length 256]
TRL is not installed with the rest: pip install --group training

SmolLM2-135M, LoRA of rank 8 on all linear layers, AdamW; every step has the same rows of the example documents, the
second half of each learnt. Each way runs in a process of its own, in turns. Prints tokens per CPU-second (user and
system) without the first step, the peak of resident memory, and the first and last loss, which must agree. On a busy
machine CPU time is what means something. `malloc`: the peer gets the allocator settings that calpaca gives itself.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
RANK, ALPHA, RATE = 8, 16.0, 1e-4


class Clock:
    """CPU seconds at the end of every step, as a callback of any Trainer."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        ends, losses = self.ends, self.losses = list[float](), list[float]()

        class Callback(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(time.process_time())

            def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
                if "loss" in logs:
                    losses.append(logs["loss"])

        self.callback = Callback()

    def report(self, tokens: int) -> dict[str, float]:
        steps = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        return {
            "rate": tokens / statistics.median(steps),
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "first": self.losses[0],
            "last": self.losses[-1],
        }


def model_folder() -> Path:
    from calpaca import runtime
    from calpaca.core.sources import resolve_model

    return resolve_model("smollm2-135m-instruct", runtime(), format="hf").path


def token_rows(folder: Path, rows: int, length: int) -> list[list[int]]:
    """Rows of tokens from the example documents."""
    from calpaca.core.tokenizer import load_tokenizer

    text = (ROOT / "examples" / "handbook.md").read_text("utf-8") * 20
    ids = load_tokenizer(folder).encode(text)
    return [ids[at * length : (at + 1) * length] for at in range(rows)]


# The ways -------------------------------------------------------------------------------------------------------------


def with_calpaca(options: argparse.Namespace, output: Path, *, compiled: bool = False) -> dict[str, float]:
    import numpy as np

    from calpaca import runtime
    from calpaca_trainer.batches import BatchOptions, plan_batches
    from calpaca_trainer.causal_trainer import CausalTrainer, Plan, Sharing
    from calpaca_trainer.collator import Collator
    from calpaca_trainer.dataset import Dataset
    from calpaca_trainer.learner import load_learner
    from calpaca_trainer.malloc import keep_memory
    from calpaca_trainer.metrics import MetricsWriter
    from calpaca_trainer.recipe import read_recipe
    from calpaca_trainer.rendering import Example
    from calpaca_trainer.saved import Saver
    from calpaca_trainer.token_cache import write_cache
    from calpaca_trainer.training import Preparation, load_subject, training_arguments

    keep_memory()
    values = {
        "model": "smollm2-135m-instruct", "rank": RANK, "alpha": ALPHA, "learning_rate": RATE, "warmup": 0.0, "schedule": "constant",
        "batch_size": options.rows, "max_length": options.length, "max_steps": options.steps, "dtype": "bfloat16", "compile": compiled,
    }  # fmt: skip
    recipe = read_recipe(None, values, "bench")
    files, prompting = load_subject(recipe, runtime())
    examples = [
        (1, Example(ids, ((len(ids) // 2, len(ids)),)))
        for ids in token_rows(files.weights, options.rows, options.length)
    ]
    cache = write_cache(f"bench-{os.getpid()}", output / "rows", examples, [], {})
    dataset, members = Dataset((cache,), (1.0,), ("",)), np.arange(options.rows)
    plan = BatchOptions(options.rows, options.length)
    batches = plan_batches(dataset, members, plan, epochs=1, max_steps=options.steps)
    it = Preparation("sft", recipe, files, prompting, dataset, members, members[:0], batches, [], None, False)  # type: ignore[arg-type]
    learner, clock = load_learner(recipe, files, prompting), Clock()
    arguments = training_arguments(it, output, learner)
    arguments.save_strategy = "no"
    trainer = CausalTrainer(
        learner, args=arguments, plan=Plan(dataset, batches, []), collator=Collator(0), saver=Saver(learner, "base", {}),
        metrics=MetricsWriter(output), sharing=Sharing(), callbacks=[clock.callback],
    )  # fmt: skip
    trainer.train()
    return clock.report(options.rows * options.length)


def labelled(folder: Path, options: argparse.Namespace) -> list[dict[str, list[int]]]:
    half = options.length // 2
    rows = token_rows(folder, options.rows, options.length) * options.steps
    return [{"input_ids": ids, "labels": [-100] * half + ids[half:]} for ids in rows]


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def common(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output), "max_steps": options.steps, "per_device_train_batch_size": options.rows, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip


def with_trl(options: argparse.Namespace, output: Path, *, best: bool) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    folder, clock = model_folder(), Clock()
    tuned = {"gradient_checkpointing": False} if best else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if best else torch.float32)
    trainer = SFTTrainer(
        model, args=SFTConfig(**common(options, output), max_length=options.length, **tuned),
        train_dataset=Dataset.from_list(labelled(folder, options)), peft_config=adapter(), callbacks=[clock.callback],
    )  # fmt: skip
    trainer.train()
    return clock.report(options.rows * options.length)


def with_trainer(options: argparse.Namespace, output: Path) -> dict[str, float]:
    """As well tuned as it can be without a loss of one's own: bfloat16 base, no checkpointing, no mask."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

    folder, clock = model_folder(), Clock()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), adapter())
    trainer = Trainer(
        model, TrainingArguments(**common(options, output)), train_dataset=labelled(folder, options),  # type: ignore[arg-type]
        data_collator=default_data_collator, callbacks=[clock.callback],
    )  # fmt: skip
    trainer.train()
    return clock.report(options.rows * options.length)


WAYS: dict[str, tuple[Any, dict[str, str]]] = {
    "calpaca": (with_calpaca, {}),
    "calpaca-compiled": (lambda options, output: with_calpaca(options, output, compiled=True), {}),
    "trl-default": (lambda options, output: with_trl(options, output, best=False), {}),
    "trl-best": (lambda options, output: with_trl(options, output, best=True), MALLOC),
    "trainer": (with_trainer, MALLOC),
}
"""How each is run, and its environment."""


def in_a_process(way: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", way, *sys.argv[1:]]
    result = subprocess.run(command, env={**os.environ, **WAYS[way][1]}, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{way}: {result.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["calpaca", "trl-default", "trl-best", "trainer"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        with tempfile.TemporaryDirectory() as folder:
            print("\n" + json.dumps(WAYS[options.only][0](options, Path(folder))))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
    for _ in range(options.rounds):
        for way in options.ways:
            runs[way].append(in_a_process(way))
    best = statistics.median(each["rate"] for each in runs[options.ways[0]])
    print(f"{'way':<18}{'tokens/CPU-s':>14}{'ratio':>8}{'peak MB':>10}   first and last loss")
    for way, measured in runs.items():
        rate = statistics.median(each["rate"] for each in measured)
        memory = statistics.median(each["memory"] for each in measured)
        losses = f"{measured[0]['first']:.4f} {measured[0]['last']:.4f}"
        print(f"{way:<18}{rate:>14.0f}{best / rate:>8.2f}{memory / 1e6:>10.0f}   {losses}")


if __name__ == "__main__":
    main()
