"""Log probabilities of a prompt's own tokens are those of a plain forward pass, whatever else runs and is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calpaca.core.engine import Completion, Handle, Request, Sampling
from calpaca.core.engines.transformers import TransformersEngine
from calpaca.core.errors import ContextOverflowError
from calpaca.core.files import ModelFiles
from calpaca.core.spec import ModelSpec
from calpaca.core.weights import LoadedWeights, load_weights

torch = pytest.importorskip("torch")

TEXT = "The llama carries wool and salt over the mountains, and the herder walks in front of it with a lantern. "
ADAPTER = "tuned"


def weights(smollm2: Path) -> LoadedWeights:
    return load_weights(ModelFiles("smollm2", ModelSpec(device="cpu", dtype="float32"), smollm2, (), smollm2, None))


@pytest.fixture(scope="module")
def tuned(smollm2: Path) -> Any:
    """The model as transformers and PEFT run it, with one adapter."""
    from peft import LoraConfig, get_peft_model

    modules = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(weights(smollm2).model, LoraConfig(r=4, target_modules=modules), adapter_name=ADAPTER)
    torch.manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter.data, std=0.03)
    return model.eval()


@pytest.fixture(scope="module")
def engine(smollm2: Path, tuned: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersEngine]:
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder, save_embedding_layers=False)
    engine = TransformersEngine(weights(smollm2))
    engine.load_adapter(ADAPTER, folder / ADAPTER)
    yield engine
    engine.close()


def plain(tuned: Any, ids: list[int], adapter: str | None) -> Any:
    """Log probabilities [tokens, vocabulary] after each of `ids`."""
    with torch.inference_mode():
        if adapter is None:
            with tuned.disable_adapter():
                logits = tuned(input_ids=torch.tensor([ids])).logits
        else:
            logits = tuned(input_ids=torch.tensor([ids])).logits
    return torch.log_softmax(logits[0], dim=-1)


def ask(
    engine: TransformersEngine,
    ids: list[int],
    *,
    adapter: str | None = None,
    new_tokens: int = 0,
    alternatives: int = 2,
) -> Handle:
    sampling = Sampling(max_new_tokens=new_tokens)
    return engine.submit(Request(tuple(ids), sampling, adapter=adapter, prompt_logprobs=alternatives))


def check(answer: Completion, ids: list[int], expected: Any, alternatives: int = 2) -> None:
    first, *others = answer.prompt_logprobs
    assert first is None
    assert [entry.token_id for entry in others if entry is not None] == ids[1:]
    for position, entry in enumerate(others):
        assert entry is not None
        assert entry.logprob == pytest.approx(float(expected[position, ids[position + 1]]), abs=2e-4)
        best = torch.topk(expected[position], alternatives).values.tolist()
        assert [value for _, _, value in entry.top] == pytest.approx(best, abs=2e-4)


@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_alone_they_are_those_of_a_forward_pass(engine: TransformersEngine, tuned: Any, adapter: str | None) -> None:
    ids = engine.encode(TEXT)
    answer = ask(engine, ids, adapter=adapter).result(60)
    check(answer, ids, plain(tuned, ids, adapter))
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", (), "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 0)


def test_among_others_they_are_the_same(engine: TransformersEngine, tuned: Any) -> None:
    prompts = [engine.encode(f"Number {number}. {TEXT * (number % 3 + 1)}") for number in range(4)]
    company = [engine.submit(Request(f"{number}, then", Sampling(max_new_tokens=30))) for number in range(8)]
    asked = [(ids, adapter, ask(engine, ids, adapter=adapter)) for ids in prompts for adapter in (None, ADAPTER)]
    for ids, adapter, handle in asked:
        check(handle.result(120), ids, plain(tuned, ids, adapter))
    for handle in company:
        assert handle.result(120).prompt_logprobs == ()


def test_what_is_kept_of_earlier_prompts_takes_nothing_away(engine: TransformersEngine, tuned: Any) -> None:
    ids = engine.encode(TEXT * 6)
    first = engine.submit(Request(tuple(ids), Sampling(max_new_tokens=1))).result(60)
    scored = ask(engine, ids).result(60)
    assert scored.usage.cached_tokens == 0
    check(scored, ids, plain(tuned, ids, None))
    again = engine.submit(Request(tuple(ids), Sampling(max_new_tokens=1))).result(60)
    assert again.usage.cached_tokens > 0
    assert again.token_ids == first.token_ids


def test_a_long_prompt_is_scored_in_pieces(engine: TransformersEngine, tuned: Any) -> None:
    widest = 0
    decode = engine.batch.decoder

    class Watched:
        slots = True

        def __call__(self, step: Any) -> Any:
            nonlocal widest
            logits = decode(step)
            widest = max(widest, logits.nbytes)
            return logits

    ids = engine.encode(TEXT * 60)[:1200]
    engine.batch.decoder = Watched()  # type: ignore[assignment]
    engine.batch._most_scored, most = 96, engine.batch._most_scored
    try:
        answer = ask(engine, ids).result(120)
    finally:
        engine.batch.decoder, engine.batch._most_scored = decode, most
    assert widest == 96 * 4 * engine._vocabulary_size
    check(answer, ids, plain(tuned, ids, None))


def test_they_come_with_the_first_chunk_and_the_answer_after_them_is_unchanged(engine: TransformersEngine) -> None:
    ids = engine.encode(TEXT * 2)
    plain_answer = engine.submit(Request(tuple(ids), Sampling(max_new_tokens=8))).result(60)
    first, *others = ask(engine, ids, new_tokens=8)
    assert len(first.prompt_logprobs) == len(ids)
    assert all(chunk.prompt_logprobs == () for chunk in others)
    assert "".join(chunk.text for chunk in (first, *others)) == plain_answer.text


def test_a_prompt_of_one_token_has_nothing_to_score(engine: TransformersEngine) -> None:
    answer = ask(engine, engine.encode("The")[:1]).result(60)
    assert (answer.prompt_logprobs, answer.finish_reason) == ((None,), "length")


def test_a_prompt_that_fills_the_context_can_be_scored(engine: TransformersEngine) -> None:
    limit = engine.capabilities().context_length
    assert limit is not None
    handle = ask(engine, [5] * limit)
    handle.cancel()
    assert handle.result(60).finish_reason == "cancelled"
    with pytest.raises(ContextOverflowError, match=str(limit + 1)):
        ask(engine, [5] * (limit + 1))
