"""What the transformers engine computes only once: beginnings that requests share, and answers that quote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from calpaca.core.engine import Completion, Request, Sampling
from calpaca.core.engines.lookup import LONGEST, PromptLookup
from calpaca.core.engines.prefix import BLOCK, PrefixCache
from calpaca.core.engines.slots import Shelf
from calpaca.core.engines.transformers import TransformersEngine, open_engine
from calpaca.core.files import ModelFiles
from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec

torch = pytest.importorskip("torch")

TEXT = "The llama carries wool and salt over the mountains, and the herder walks in front of it with a lantern. "


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[TransformersEngine]:
    spec = ModelSpec(device="cpu", dtype="float32")
    engine = open_engine(ModelFiles("smollm2", spec, smollm2, (), smollm2, None), Runtime(Settings()))
    yield engine
    engine.close()


def ask(engine: TransformersEngine, prompt: list[int], new_tokens: int = 12, **sampling: object) -> Completion:
    return engine.submit(Request(tuple(prompt), Sampling(max_new_tokens=new_tokens, **sampling))).result(120)


def forget(engine: TransformersEngine) -> None:
    engine.batch.prefixes.clear()
    assert engine.batch.prefixes.bytes == 0


def test_a_follow_up_reuses_what_the_first_question_computed(engine: TransformersEngine) -> None:
    forget(engine)
    context = engine.encode(TEXT * 12)
    first = ask(engine, context + engine.encode("Who carries wool?"))
    second = ask(engine, context + engine.encode("Where does the herder walk?"))
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == len(context) // BLOCK * BLOCK
    forget(engine)
    assert ask(engine, context + engine.encode("Where does the herder walk?")).token_ids == second.token_ids


def test_an_answer_is_part_of_what_the_next_turn_reuses(engine: TransformersEngine) -> None:
    forget(engine)
    prompt = engine.encode(TEXT * 2)
    answer = ask(engine, prompt, 2 * BLOCK)
    following = ask(engine, [*prompt, *answer.token_ids, *engine.encode("And then?")])
    assert following.usage.cached_tokens >= (len(prompt) + len(answer.token_ids) - 1) // BLOCK * BLOCK > len(prompt)


def test_eight_interleaved_conversations_all_hit(engine: TransformersEngine) -> None:
    forget(engine)
    conversations = [engine.encode(f"Conversation {number}: " + TEXT * 4) for number in range(8)]
    for turn in range(3):
        handles = [
            engine.submit(Request(tuple(ids), Sampling(max_new_tokens=6))) for ids in conversations
        ]  # all at once
        for ids, handle in zip(conversations, handles, strict=True):
            answer = handle.result(120)
            if turn:
                assert answer.usage.cached_tokens >= (len(ids) - 40) // BLOCK * BLOCK
            ids += [*answer.token_ids, *engine.encode(" Go on.")]


def test_requests_that_come_together_compute_their_common_beginning_once(engine: TransformersEngine) -> None:
    forget(engine)
    context = engine.encode(TEXT * 8)
    prompts = [context + engine.encode(f"Question {number}?") for number in range(6)]
    handles = [engine.submit(Request(tuple(prompt), Sampling(max_new_tokens=4))) for prompt in prompts]
    cached = sorted(handle.result(120).usage.cached_tokens for handle in handles)
    assert cached == [0] + [len(context) // BLOCK * BLOCK] * 5


def test_another_beginning_reuses_nothing(engine: TransformersEngine) -> None:
    forget(engine)
    context = engine.encode(TEXT * 4)
    ask(engine, context)
    assert ask(engine, engine.encode("So: ") + context).usage.cached_tokens == 0


def test_the_cache_drops_what_was_not_used_for_longest_and_the_end_of_a_text_before_its_beginning() -> None:
    prefixes = PrefixCache(lambda: 1 << 40)
    texts = [list(range(start, start + 4 * BLOCK)) for start in (0, 1000)]
    for ids in texts:
        place = Shelf(512).take(200)
        place.shelf.write(place, torch.rand(2, 3, len(ids), 8))
        place.filled = len(ids)
        prefixes.keep(ids, 0, place)
    prefixes.shrink(prefixes.bytes * 6 // 8)
    assert [known(prefixes, ids) for ids in texts] == [2 * BLOCK, 4 * BLOCK]
    prefixes.shrink(prefixes.bytes // 6)  # the second text was used last
    assert [known(prefixes, ids) for ids in texts] == [0, BLOCK]


def test_what_comes_back_from_the_cache_is_what_went_in_and_only_for_its_adapter() -> None:
    prefixes = PrefixCache(lambda: 1 << 40)
    ids, states = list(range(3 * BLOCK + 5)), torch.rand(4, 2, 3 * BLOCK + 5, 8)
    place = Shelf(512).take(200)
    place.shelf.write(place, states)
    place.filled = len(ids)
    prefixes.keep(ids, 1, place)
    other = Shelf(512).take(200)
    assert prefixes.restore(ids, 2, other) == 0
    assert prefixes.restore(ids, 1, other) == 3 * BLOCK
    assert torch.equal(other.shelf.read(other, 0, 3 * BLOCK), states[:, :, : 3 * BLOCK])


def known(prefixes: PrefixCache, ids: list[int]) -> int:
    return prefixes.restore([*ids, 0], 0, Shelf(512).take(200))


def test_guesses_leave_greedy_answers_as_they_are(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [engine.encode(f"{TEXT * 3}\nRepeat the text above.\n{TEXT[: 20 * n]}") for n in range(1, 4)]
    guessed = [ask(engine, prompt, 40) for prompt in prompts]
    monkeypatch.setattr(PromptLookup, "draft", lambda *_: [])
    assert [ask(engine, prompt, 40).token_ids for prompt in prompts] == [answer.token_ids for answer in guessed]


def test_guesses_leave_sampled_answers_and_logprobs_as_they_are(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = engine.encode(f"{TEXT * 3}\nRepeat the text above.\n{TEXT}")
    options = {"temperature": 0.7, "seed": 5, "logprobs": 2, "repetition_penalty": 1.05}
    guessed = ask(engine, prompt, 30, **options)
    monkeypatch.setattr(PromptLookup, "draft", lambda *_: [])
    plain = ask(engine, prompt, 30, **options)
    assert plain.token_ids == guessed.token_ids
    assert [entry.logprob for entry in plain.logprobs] == pytest.approx(
        [entry.logprob for entry in guessed.logprobs], abs=1e-3
    )


def test_guesses_are_what_followed_before_more_of_them_once_they_come_true_and_fewer_after_wrong_ones() -> None:
    lookup = PromptLookup()
    ids = [1, 2, 3, 4, 5, 9, 1, 2, 3]
    assert lookup.draft(ids, 5, 50) == [4, 5, 9, 1, 2]
    assert lookup.draft(ids, 5, 2) == [4, 5]
    assert lookup.draft([7, 8, 3, 4, 3], 5, 50) == [4, 3, 4, 3, 4]  # as far as it goes, then over again
    assert lookup.draft([7, 8], 5, 50) == []
    for _ in range(3):
        lookup.note(5, 5)
    assert len(lookup.draft(ids, 5, 50)) == LONGEST
    for _ in range(9):
        lookup.note(5, 0)
    assert len(lookup.draft(ids, 5, 50)) == 5
    assert PromptLookup().draft([1, 9, 2, 1], 5, 50) == [9, 2, 1, 9, 2]
    assert PromptLookup().draft([1, 5, 1, 5, 7, 1, 6, 1], 3, 50) == [5, 7, 1]  # 5 came after 1 more often than 6
    poor = PromptLookup()
    poor.right = 0.0
    assert poor.draft([1, 9, 2, 1], 5, 50) == []  # one token is too little to go by
