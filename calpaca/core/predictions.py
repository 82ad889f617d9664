"""Files of answers: JSON Lines, or the list of Chinese-LLaMA-Alpaca's `inference_hf.py` (seed)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal, TextIO

from calpaca.core.engine import Sampling
from calpaca.core.generation import Answer, Generation
from calpaca.core.jobs import Job

Form = Literal["jsonl", "seed"]


def write_predictions(generation: Generation, job: Job, stream: TextIO, form: Form = "jsonl") -> Iterator[Answer]:
    """Write the answers in the order of the instructions, and give each out once it is written.

    `jsonl` has an object per line: `index`, `input` (the row as it was), `answer`, `finish_reason`, `usage`, and `error`
    where the instruction failed. `seed` is one list of `{"Input": prompt, "Output": answer}`.
    """
    for place, answer in generation.answers(job):
        if form == "jsonl":
            stream.write(json.dumps(_record(generation, place, answer), ensure_ascii=False) + "\n")
        else:
            pair = json.dumps(_pair(generation, place, answer), ensure_ascii=False, indent=1)
            stream.write(("[\n" if place == 0 else ",\n") + pair)
        yield answer
    if form == "seed":
        stream.write("\n]\n")


def _record(generation: Generation, place: int, answer: Answer) -> dict[str, Any]:
    instruction = generation.instructions[place]
    if answer.error is not None:
        return {"index": place, "input": instruction.row, "error": answer.error}
    counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    return {
        "index": place,
        "input": instruction.row,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": counts,
    }


def _pair(generation: Generation, place: int, answer: Answer) -> dict[str, str]:
    pair = {"Input": generation.prompt(place), "Output": answer.text}
    return pair if answer.error is None else {**pair, "Error": answer.error}


def generation_config(sampling: Sampling) -> dict[str, Any]:
    """The `generation_config.json` beside a seed file: how tokens were chosen, under transformers' names."""
    values = asdict(sampling)
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
    return {"do_sample": sampling.temperature > 0, "num_beams": 1, **{name: values[name] for name in names}}
