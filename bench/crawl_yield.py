"""Rows kept from a budget of generated tokens, and how different they are: `calpaca crawl instructions` beside the seed's way.

    python bench/crawl_yield.py [--model MODEL] [--tokens 6000] [--language en] [--records 2] [--seed 0]

The seed is crawl_prompt.py of Chinese-LLaMA-Alpaca: one plain prompt asks for 20 records of drawn topics and kinds of
tasks, and the raw text is written down. Here it may generate as many tokens as ours did, and gets what it lacks: its
records are read with our own reader, repaired where that goes, and judged by our own filters, so that only the way of
asking differs. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from calpaca.core.engine import Sampling
from calpaca.core.settings import read_settings
from calpaca.core.spec import ModelSpec
from calpaca.plugins.wiring import build_runtime
from calpaca_crawl.filters import Filters, Limits
from calpaca_crawl.prompts import Prompts
from calpaca_crawl.reply import read_records
from calpaca_crawl.report import diversity
from calpaca_crawl.row import read_row

_SEED_RECORDS = 20
_SEED_LONGEST = 1_000
"""Tokens of one of the seed's replies, at the most: its twenty records would need more, and small models never end."""
_AT_ONCE = 4
_SEED_PROMPT = {
    "en": "Give me {count} different records of training data in JSON with instruction, input and output, that meet these "
    "conditions:\n1. The topics vary: {topics}.\n2. The wording varies, and so do the kinds of tasks: {tasks}.\n3. What a "
    "language model cannot do is refused.\n4. They are in English, as commands or questions.\n5. The input is real material "
    "without placeholders, of at most 100 characters.\n6. The output is a fitting and true answer, not only yes or no, of at "
    "most 300 characters.\nThe {count} records in JSON:",
    "zh": "请给出{count}条不同的JSON格式训练数据，字段为instruction、input、output，要求：\n1. 主题多样：{topics}。\n2. 措辞多样，任务类型多样："
    "{tasks}。\n3. 语言模型做不到的任务应当拒绝。\n4. 使用中文，可以是命令或问题。\n5. input是具体的材料，不能是占位符，不超过100字。\n"
    "6. output是恰当、真实的回答，不能只有是或否，不超过300字。\n请给出满足条件的{count}条JSON格式数据：",
}


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Our command, whose cost is what it generates: it stops before that could exceed --tokens."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        budget = ["--price-out", "1000000", "--max-cost", str(options.tokens), "--max-rows", "100000"]
        command = [sys.executable, "-m", "calpaca", "crawl", "instructions", str(rows), "--language", options.language,
                   "--records", str(options.records), "--seed", str(options.seed), "--in-flight", str(_AT_ONCE), *budget, "--json"]  # fmt: skip
        command += ["--model", options.model] if options.model else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        figures = json.loads(done.stdout or rows.with_suffix(".report.json").read_text("utf-8"))
    return {
        name: figures[name]
        for name in ("rows", "completion_tokens", "rows_per_1000_generated_tokens", "diversity", "rejected")
    }


def seed(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """The seed's prompt, again and again, until at least so many tokens are generated."""
    prompts, kept, generated = Prompts(options.language), [], 0
    filters = Filters(Limits(language=options.language, toxic=prompts.lines("toxic")))
    rejected: Counter[str] = Counter()
    with build_runtime(read_settings()) as runtime:
        model = runtime.model(ModelSpec(model=options.model))
        for batch in count(0, _AT_ONCE):
            if generated >= tokens:
                break
            asked = [
                seed_prompt(prompts, Random(f"{options.seed} {number}")) for number in range(batch, batch + _AT_ONCE)
            ]
            most = min((tokens - generated) // _AT_ONCE + 1, _SEED_LONGEST)
            sampling = Sampling(temperature=0.9, top_p=0.95, max_new_tokens=most, seed=options.seed + batch)
            handles = [model.chat([{"role": "user", "content": each}], sampling) for each in asked]
            for reply in [handle.result() for handle in handles]:
                generated += reply.usage.completion_tokens
                for record in read_records(reply.text) or [{}]:
                    row = read_row(record)
                    reason = "no_json" if row is None else filters.reason(row)
                    if row is not None and reason is None:
                        kept.append(row.question)
                    else:
                        rejected[str(reason)] += 1
    return {
        "rows": len(kept), "completion_tokens": generated, "diversity": diversity(kept), "rejected": dict(rejected),
        "rows_per_1000_generated_tokens": round(1000 * len(kept) / max(generated, 1), 3),
    }  # fmt: skip


def seed_prompt(prompts: Prompts, chance: Random) -> str:
    topics, tasks = chance.sample(prompts.lines("topics"), 10), chance.sample(prompts.lines("tasks"), 10)
    return _SEED_PROMPT[prompts.language].format(count=_SEED_RECORDS, topics=", ".join(topics), tasks=", ".join(tasks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=6_000)
    parser.add_argument("--language", choices=["en", "zh"], default="en")
    parser.add_argument("--records", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    made = ours(options)
    print(json.dumps({"ours": made, "seed": seed(options, made["completion_tokens"])}, ensure_ascii=False))


if __name__ == "__main__":
    main()
