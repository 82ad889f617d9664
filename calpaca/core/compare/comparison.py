"""Whether two models compute the same: base with adapters against merged, one dtype against another, any two.

The models are loaded one after the other. The logits of every position of a few prompts are compared, and the tokens
that each would go on with. How large a difference may be is stated relative to the largest logit, since rounding grows
with the numbers. A weak adapter may change less than that, so it is also looked at whether the other model is nearer to
this one with each adapter or without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calpaca.core.adapters import Adapter
from calpaca.core.compare.outputs import Ids, Outputs, run
from calpaca.core.compare.tensors import TensorComparison, compare_tensors
from calpaca.core.errors import UsageError
from calpaca.core.files import ModelFiles, find_files
from calpaca.core.model_facts import read_facts
from calpaca.core.sources import resolve_model
from calpaca.core.spec import AdapterSpec, ModelSpec
from calpaca.core.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from calpaca.core.runtime import Runtime

PROMPTS = (
    "The llama is a domesticated animal of South America. Its wool is soft, and",
    "Question: Why does the sky look blue during the day and red at sunset?\nAnswer:",
    "羊驼是一种生活在南美洲的动物，它的毛",
    "以下是一条指令：请用中文介绍北京的历史，并列出三个著名的景点。\n回答：",
    'def fibonacci(n: int) -> list[int]:\n    """The first n numbers."""\n    a, b = 0, 1\n',
    "1234567890 + 9876543210 = 11111111100; 2016-02-29; 3.14159 * 2 =",
)
"""English, Chinese, code and digits."""

MOST_TOKENS = 256
"""Tokens of a prompt that are compared; the rest is left out."""

TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-1, "Q8_0": 1e-1, "8bit": 2e-1}
"""Largest logit difference, relative to the largest logit, by the coarsest number format that either side computes in or
was stored in."""

_COARSEST = 1.0  # any other format, such as 4 bits: what counts there is the share of equal tokens


@dataclass(frozen=True)
class CompareOptions:
    """`prompts` are `PROMPTS` where none are given.

    `tolerance` is relative to the largest logit; None takes the one of the coarsest number format.

    `new_tokens` is how far greedy answers are followed; 0 compares logits alone.
    """

    prompts: tuple[str, ...] = ()
    tolerance: float | None = None
    new_tokens: int = 32
    tensors: bool = True


@dataclass(frozen=True)
class PromptComparison:
    """One prompt. `positions` counts its tokens and `agreeing` those after which both find the same token likeliest.

    `largest` and `mean` are differences of logits, `at` the position of the largest. `scale` is the largest logit of A.
    The greedy answers part at token `parts_at`, counted from 0. `same_ids` is False where the tokenizers differ on it.
    """

    prompt: str
    positions: int
    agreeing: int
    largest: float
    mean: float
    at: int
    scale: float
    same_ids: bool
    greedy_a: str = ""
    greedy_b: str = ""
    parts_at: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What two models have in common. `rows_a` and `rows_b` count logits; only the `ids` first ones are compared.

    `missing` names the adapters of one side without which it would be nearer to the other, `idle` those that change no
    logit of their own side. `same_template` is about the chat templates, which logits say nothing of. `tensors` is None
    where a side has adapters or is a GGUF file.
    """

    a: str
    b: str
    dtype_a: str
    dtype_b: str
    rows_a: int
    rows_b: int
    tolerance: float
    missing: tuple[str, ...]
    idle: tuple[str, ...]
    same_template: bool
    prompts: tuple[PromptComparison, ...]
    tensors: TensorComparison | None = None

    @property
    def ids(self) -> int:
        return min(self.rows_a, self.rows_b)

    @property
    def positions(self) -> int:
        return sum(each.positions for each in self.prompts)

    @property
    def largest(self) -> float:
        """The largest difference of two logits."""
        return max(each.largest for each in self.prompts)

    @property
    def mean(self) -> float:
        return sum(each.mean * each.positions for each in self.prompts) / self.positions

    @property
    def scale(self) -> float:
        """The largest logit of A, without its sign."""
        return max(each.scale for each in self.prompts)

    @property
    def relative(self) -> float:
        """The largest difference in parts of the largest logit: what the tolerance is about."""
        return self.largest / self.scale if self.scale else float(self.largest > 0)

    @property
    def agreement(self) -> float:
        """Share of all positions at which both find the same token likeliest."""
        return sum(each.agreeing for each in self.prompts) / self.positions

    @property
    def identical(self) -> bool:
        """No logit differs."""
        return self.largest == 0

    @property
    def same_tokens(self) -> bool:
        """Both tokenizers give the same ids for all prompts."""
        return all(each.same_ids for each in self.prompts)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the models are not the same, in sentences; none when they are."""
        found = [f"Without adapter {name} the models agree better: the other one lacks it." for name in self.missing]
        if self.relative > self.tolerance:
            found.insert(
                0,
                f"Logits differ by up to {self.largest:.4g}, {self.relative:.2e} of the largest; the tolerance is"
                f" {self.tolerance:g}.",
            )
        if not self.same_tokens:
            others = sum(not each.same_ids for each in self.prompts)
            found.append(f"The tokenizers give other ids for {others} of {len(self.prompts)} prompts.")
        return tuple(found)

    @property
    def within_tolerance(self) -> bool:
        """Logits differ by no more than the tolerance, no adapter is missing, and the tokenizers agree."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Everything, the properties included, as JSON values."""
        names = ("ids", "positions", "largest", "mean", "scale", "relative", "agreement", "identical", "same_tokens")
        return {
            "within_tolerance": self.within_tolerance,
            "problems": self.problems,
            **{name: getattr(self, name) for name in names},
            **asdict(self),
        }


@dataclass(frozen=True)
class _Probe:
    """A prompt and the token ids that both models are given for it."""

    prompt: str
    ids: Ids
    same_ids: bool


def compare(a: ModelSpec, b: ModelSpec, runtime: Runtime, options: CompareOptions = CompareOptions()) -> Comparison:
    """Load `a`, then `b`, and compare what they compute. Where `b` names no dtype it runs in that of `a`.

    Raises ModelError for a model that cannot be loaded, or gives logits that are not finite.
    """
    return _compare(runtime.spec(a), runtime.spec(b), runtime, options)


def changes_logits(base: ModelSpec, adapter: AdapterSpec, runtime: Runtime, prompts: tuple[str, ...] = ()) -> bool:
    """Whether an adapter does anything at all to `base` (a spec that may carry adapters already)."""
    without = runtime.spec(base)
    adapted = without.model_copy(update={"adapters": (*without.adapters, adapter)})
    options = CompareOptions(prompts, new_tokens=0, tensors=False)
    comparison = _compare(without, adapted, runtime, options)
    return not comparison.identical or comparison.rows_a != comparison.rows_b


def _compare(a: ModelSpec, b: ModelSpec, runtime: Runtime, options: CompareOptions) -> Comparison:
    files_a, files_b = find_files(a, runtime), find_files(b, runtime)
    sources = [resolve_model(spec.model, runtime, revision=spec.revision).path for spec in (a, b)]
    tensors = _compare_tensors((files_a, files_b), sources) if options.tensors else None
    tokenizers = _tokenizer(files_a), _tokenizer(files_b)
    probes = [_probe(prompt, *tokenizers) for prompt in options.prompts or PROMPTS]
    ids = [probe.ids for probe in probes]
    outputs_a = run(files_a, ids, options.new_tokens)
    if b.dtype == "auto":
        files_b = replace(files_b, spec=b.model_copy(update={"dtype": outputs_a.dtype}))
    outputs_b = run(files_b, ids, options.new_tokens)
    formats = [outputs_a.dtype, outputs_b.dtype, *_rounded_to((a, b), sources)]
    return Comparison(
        a=str(a),
        b=str(b),
        dtype_a=outputs_a.dtype,
        dtype_b=outputs_b.dtype,
        rows_a=outputs_a.rows,
        rows_b=outputs_b.rows,
        missing=(*_missing(files_a, outputs_a, outputs_b), *_missing(files_b, outputs_b, outputs_a)),
        idle=(*_idle(files_a, outputs_a), *_idle(files_b, outputs_b)),
        same_template=_template(files_a, tokenizers[0]) == _template(files_b, tokenizers[1]),
        tolerance=options.tolerance if options.tolerance is not None else _tolerance(formats),
        prompts=tuple(_compared(number, probes, (outputs_a, outputs_b), tokenizers) for number in range(len(probes))),
        tensors=tensors,
    )


def _compare_tensors(models: tuple[ModelFiles, ModelFiles], sources: Sequence[Path]) -> TensorComparison | None:
    """None where a side has adapters or is a GGUF file: its tensors are not those that are computed with."""
    if any(files.adapters for files in models) or any(path.suffix == ".gguf" for path in sources):
        return None
    return compare_tensors(models[0].weights, models[1].weights)


def _rounded_to(specs: Sequence[ModelSpec], sources: Sequence[Path]) -> list[str | None]:
    """Number formats that the weights went through: quantized while loading, or stored, adapters merged into them.

    Adapters that are not merged are not rounded, so their base's format makes no difference.
    """
    stored = [read_facts(path).dtype for spec, path in zip(specs, sources, strict=True) if not spec.adapters]
    return [*(spec.quantization for spec in specs), *stored]


def _tokenizer(files: ModelFiles) -> Tokenizer:
    return load_tokenizer(files.tokenizer, trust_remote_code=files.spec.trust_remote_code)


def _template(files: ModelFiles, tokenizer: Tokenizer) -> str | None:
    return files.template.source if files.template is not None else tokenizer.chat_template


def _probe(prompt: str, a: Tokenizer, b: Tokenizer) -> _Probe:
    """The ids of A's tokenizer, or of B's where A's are beyond B's vocabulary."""
    ids_a, ids_b = (tuple(each.encode(prompt, special_tokens=True)[:MOST_TOKENS]) for each in (a, b))
    if not prompt or not ids_a or not ids_b:
        raise UsageError("A prompt is empty.", "Give at least one token of text with --prompt.")
    return _Probe(prompt, ids_a if max(ids_a) < len(b) else ids_b, ids_a == ids_b)


def _tolerance(formats: Sequence[str | None]) -> float:
    return max(TOLERANCES.get(each, _COARSEST) for each in formats if each is not None)


def _missing(files: ModelFiles, adapted: Outputs, other: Outputs) -> list[str]:
    """Adapters without which `adapted` would be nearer to `other`."""
    distance = _distance(adapted.logits, other.logits)
    without = adapted.without.items()
    return [files.adapters[number].name for number, logits in without if _distance(logits, other.logits) < distance]


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(_difference(one, two).sum().item() for one, two in zip(a, b, strict=True))


def _idle(files: ModelFiles, outputs: Outputs) -> list[str]:
    """Adapters that replace no tensor and whose low-rank part changes no logit."""
    adapters = {number: files.adapters[number] for number in outputs.without}
    return [
        adapter.name
        for number, adapter in adapters.items()
        if all(".lora_" in name for name in Adapter(adapter).shapes)
        and _distance(outputs.without[number], outputs.logits) == 0
    ]


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Absolute differences [positions, ids] over the ids that both have."""
    ids = min(a.shape[1], b.shape[1])
    return (a[:, :ids] - b[:, :ids]).abs()


def _compared(
    number: int, probes: Sequence[_Probe], outputs: tuple[Outputs, Outputs], tokenizers: tuple[Tokenizer, Tokenizer]
) -> PromptComparison:
    ids = min(each.rows for each in outputs)
    a, b = (each.logits[number][:, :ids] for each in outputs)
    difference = _difference(a, b)
    greedy_a, greedy_b = (each.greedy[number] for each in outputs)
    common = next((at for at, pair in enumerate(zip(greedy_a, greedy_b, strict=False)) if pair[0] != pair[1]), None)
    return PromptComparison(
        prompt=probes[number].prompt,
        positions=len(a),
        agreeing=int((a.argmax(dim=-1) == b.argmax(dim=-1)).sum()),
        largest=difference.max().item(),
        mean=difference.mean().item(),
        at=int(difference.amax(dim=-1).argmax()),
        scale=a.abs().max().item(),
        same_ids=probes[number].same_ids,
        greedy_a=tokenizers[0].decode(greedy_a),
        greedy_b=tokenizers[1].decode(greedy_b),
        parts_at=common,
    )
