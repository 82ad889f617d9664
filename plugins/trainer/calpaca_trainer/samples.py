"""Answers that a model writes before and after it learns, to see what it has learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calpaca_trainer.dataset import Dataset
from calpaca_trainer.learner import Learner

_TOKENS = 60  # of an answer
_PROMPT = 400  # most tokens of a prompt
_TEXT = 32  # tokens of a plain text that are to be continued


@dataclass(frozen=True)
class Sample:
    """A prompt, what stands in the data after it, and what the model writes."""

    place: str
    prompt: str
    wanted: str
    before: str = ""
    after: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class SamplePrompt:
    """Token ids of a prompt and of what follows it in the data."""

    place: str
    ids: list[int]
    wanted: list[int]


def choose_prompts(dataset: Dataset, members: Sequence[int], count: int) -> list[SamplePrompt]:
    """The first examples whose prompt is not long."""
    found: list[SamplePrompt] = []
    for number in members:
        if len(found) == count:
            break
        example = dataset[int(number)]
        marks = example["marks"]
        start = int(marks.argmax()) or _TEXT  # a text to pre-train on has no prompt: its beginning is one
        if 0 < start <= _PROMPT and start < len(marks):
            ids = example["ids"].tolist()
            found.append(SamplePrompt(dataset.place(int(number)), ids[:start], ids[start : start + _TOKENS]))
    return found


def write_answers(learner: Learner, prompts: Sequence[SamplePrompt]) -> list[str]:
    """What the model answers, always taking the likeliest token."""
    import torch

    training = learner.model.training
    learner.model.eval()
    answers = []
    with torch.no_grad(), torch.autocast(learner.causal.device.type, torch.bfloat16, enabled=learner.mixed):
        for prompt in prompts:
            answers.append(learner.prompting.tokenizer.decode(_generate(learner, prompt.ids)))
    learner.model.train(training)
    return answers


def _generate(learner: Learner, prompt: list[int]) -> list[int]:
    import torch

    eos_ids = learner.prompting.eos_ids
    ids = torch.tensor([prompt], device=learner.causal.device)
    options: dict[str, Any] = {"max_new_tokens": _TOKENS, "do_sample": False, "use_cache": True}
    written = learner.causal.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=list(eos_ids), pad_token_id=eos_ids[0],
        temperature=None, top_p=None, top_k=None, **options,
    )  # fmt: skip
    new: list[int] = written[0, len(prompt) :].tolist()
    return new


def read_prompt(learner: Learner, prompt: SamplePrompt) -> Sample:
    """The prompt as texts."""
    decode = learner.prompting.tokenizer.decode
    return Sample(prompt.place, decode(prompt.ids), decode(prompt.wanted))
