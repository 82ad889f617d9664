"""The transformers engine under load: joining, waiting, cancelling, and what is left when all is done."""

from __future__ import annotations

import gc
import random
import resource
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calpaca.core.engine import Request, Sampling
from calpaca.core.engines import slots
from calpaca.core.engines.batch import MAX_ROWS
from calpaca.core.engines.decoder import LlamaDecoder
from calpaca.core.engines.transformers import TransformersEngine
from calpaca.core.errors import ModelError
from calpaca.core.tokenizer import load_tokenizer
from calpaca.core.weights import LoadedWeights

torch = pytest.importorskip("torch")


def weights(smollm2: Path, layers: int = 2) -> LoadedWeights:
    """A tiny random Llama that never ends an answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LoadedWeights(LlamaForCausalLM(config).eval(), load_tokenizer(smollm2), 2048, 4096, ())


@pytest.fixture
def engine(smollm2: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(weights(smollm2))
    yield engine
    engine.close()


def prompt(tokens: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(10, 2000), k=tokens))


def settle(engine: TransformersEngine) -> None:
    """Wait until nothing is under way."""
    deadline = time.monotonic() + 30
    while engine.batch.rows or engine.batch.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_that_comes_at_step_50_starts_by_step_52(engine: TransformersEngine) -> None:
    steps: list[set[Any]] = []
    decode = engine.batch.decoder
    late: list[Any] = []

    class Watched:
        slots = True
        part = decode.part
        prepare = decode.prepare

        def __call__(self, step: Any) -> Any:
            steps.append({span.row.handle for span in step.spans})
            if len(steps) == 50:
                late.append(engine.submit(Request(prompt(8, 9), Sampling(max_new_tokens=4))))
            return decode(step)

    engine.batch.decoder = Watched()
    running = [engine.submit(Request(prompt(8, seed), Sampling(max_new_tokens=80))) for seed in range(4)]
    for handle in running:
        handle.result(60)
    late[0].result(60)
    assert late[0] in steps[50] or late[0] in steps[51]


def test_a_long_prompt_does_not_hold_up_answers_under_way(engine: TransformersEngine) -> None:
    engine.batch.pace.piece = 32
    engine.batch.pace.note = lambda *_: None
    running = engine.submit(Request(prompt(8), Sampling(max_new_tokens=200)))
    next(chunks := iter(running))
    long = engine.submit(Request(prompt(2000), Sampling(max_new_tokens=1)))
    while not long.done:
        next(chunks)
    assert len(running._chunks) > 40  # one token for each piece of the prompt, or more


def test_tokens_that_fill_a_small_step_up_change_no_answer(engine: TransformersEngine) -> None:
    asked = Request(prompt(40), Sampling(12, logprobs=3))
    engine.batch._least_tokens = 1
    plain = engine.submit(asked).result(60)
    engine.batch._least_tokens = 5
    filled = engine.submit(asked).result(60)
    assert filled.token_ids == plain.token_ids
    assert [each.logprob for each in filled.logprobs] == pytest.approx(
        [each.logprob for each in plain.logprobs], abs=1e-4
    )


def test_one_request_is_guessed_and_many_are_not(engine: TransformersEngine) -> None:
    widths: dict[int, set[int]] = {}
    decode = engine.batch.decoder

    class Watched:
        slots = True
        part = decode.part
        prepare = decode.prepare

        def __call__(self, step: Any) -> Any:
            widths.setdefault(len(step.spans), set()).update(span.guesses for span in step.spans)
            return decode(step)

    engine.batch.decoder = Watched()
    for rows in (1, 6):
        handles = [engine.submit(Request(prompt(6, seed) * 3, Sampling(max_new_tokens=20))) for seed in range(rows)]
        for handle in handles:
            handle.result(60)
    assert max(widths[1]) >= 5
    assert widths[6] == {0}


def test_more_requests_than_rows_wait_and_all_are_answered(engine: TransformersEngine) -> None:
    handles = [engine.submit(Request(prompt(5, seed), Sampling(max_new_tokens=3))) for seed in range(MAX_ROWS + 20)]
    assert {handle.result(60).usage.completion_tokens for handle in handles} == {3}


def test_slots_that_others_left_are_used_again_and_rows_that_move_go_on_as_they_were(
    engine: TransformersEngine,
) -> None:
    asked = [(prompt(4 + seed % 7, seed), 4 + 9 * (seed % 5)) for seed in range(30)]
    alone = [engine.submit(Request(ids, Sampling(max_new_tokens=new))).result(60).token_ids for ids, new in asked]
    handles = [engine.submit(Request(ids, Sampling(max_new_tokens=new))) for ids, new in asked]
    assert [handle.result(60).token_ids for handle in handles] == alone


def test_200_random_cancels_leave_no_busy_slot(engine: TransformersEngine) -> None:
    chance = random.Random(4)
    handles = []
    for seed in range(200):
        handles.append(engine.submit(Request(prompt(chance.randint(1, 300), seed), Sampling(max_new_tokens=300))))
        time.sleep(chance.random() * 0.01)
        chance.choice(handles).cancel()
    for handle in handles:
        time.sleep(chance.random() * 0.002)
        handle.cancel()
    assert {handle.result(60).finish_reason for handle in handles} <= {"cancelled", "length"}
    settle(engine)
    assert engine.batch.cache._running() == []
    assert all(not shelf.layers for shelf in engine.batch.cache.shelves.values())


def test_memory_is_flat_over_1000_requests(engine: TransformersEngine) -> None:
    def ask(waves: range) -> None:
        for wave in waves:
            seeds = range(100 * wave, 100 * wave + 100)
            handles = [engine.submit(Request(prompt(40 + seed % 50, seed), Sampling(2))) for seed in seeds]
            for handle in handles:
                handle.result(60)

    engine.batch.prefixes.keep = lambda *_: None  # its bound has a test of its own
    ask(range(8))  # oneDNN keeps a routine for each shape that it has seen
    gc.collect()
    before = resident()
    ask(range(8, 18))
    gc.collect()
    assert resident() - before < 16 << 20
    assert len(engine.batch.decoder.__dict__) < 12


def test_a_row_waits_for_memory_that_others_use_and_one_that_never_fits_is_refused(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = engine.batch.cache._token_bytes
    monkeypatch.setattr(slots, "free_memory", lambda: slots.KEPT_FREE + 600 * token)
    handles = [engine.submit(Request(prompt(100, seed), Sampling(max_new_tokens=300))) for seed in range(3)]
    assert {handle.result(60).finish_reason for handle in handles} == {"length"}
    with pytest.raises(ModelError, match=r"1100 tokens of context take .* more than there are"):
        engine.submit(Request(prompt(100), Sampling(max_new_tokens=1000))).result(60)


def test_on_a_device_that_lays_slots_out_at_once_their_whole_length_counts(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = slots.SlotCache(weights(smollm2))
    cache._device = torch.device("meta")  # as little a CPU as CUDA is
    free = 3 * 2048
    monkeypatch.setattr(slots, "free_memory", lambda: slots.KEPT_FREE + free * cache._token_bytes)
    first = cache.take(600)  # of 2048
    assert first is not None and cache.missing(600) == -2048 * cache._token_bytes  # the first is not laid out yet
    assert cache.take(600) is not None
    first.shelf.layers = {layer: (torch.empty(0), torch.empty(0)) for layer in range(2)}
    free = 2047
    assert cache.missing(600) == (2048 * (2 + 1) - 2047) * cache._token_bytes  # two slots more, and a layer's old ones
    assert cache.take(600) is None
    first.shelf.release(first)
    assert cache.missing(600) < 0  # a slot that is there takes nothing more
    assert cache.take(600) is not None


@pytest.mark.slow
def test_a_short_request_among_16_long_ones_is_served_soon(engine: TransformersEngine) -> None:
    def first_token(seed: int) -> float:
        answer = engine.submit(Request(prompt(20, 500 + seed), Sampling(max_new_tokens=1))).result(60)
        return answer.timings.first_token

    idle = statistics.median(first_token(seed) for seed in range(20))
    running = [engine.submit(Request(prompt(30, seed), Sampling(max_new_tokens=3000))) for seed in range(16)]
    for handle in running:
        next(iter(handle._chunks), None)
    time.sleep(1)
    loaded = sorted(first_token(100 + seed) for seed in range(40))
    for handle in running:
        handle.cancel()
    assert loaded[37] < 10 * idle  # bench/serving.py measures it with a model of a useful size


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Gate:
    """Holds packing up: a layer is packed when `opened`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.packed = 0
        prepare = LlamaDecoder.prepare

        def held(decoder: LlamaDecoder) -> bool:
            self.reached.set()
            assert self.opened.wait(30)
            self.packed += 1
            return prepare(decoder)

        monkeypatch.setattr(LlamaDecoder, "prepare", held)


def test_an_engine_that_is_closed_while_it_packs_packs_no_further_layer(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    engine = TransformersEngine(weights(smollm2, layers=20))
    handle = engine.submit(Request(prompt(5), Sampling(5)))
    assert gate.reached.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine.batch._closed:
        time.sleep(0.001)
    gate.opened.set()
    closing.join(30)
    assert not closing.is_alive()
    assert gate.packed == 1
    assert handle.result(30).finish_reason == "cancelled"


def test_a_request_that_comes_before_packing_gets_what_it_gets_after(
    engine: TransformersEngine, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Request(prompt(40), Sampling(20, logprobs=5))
    while not engine.batch._prepared:
        time.sleep(0.001)
    after = engine.submit(asked).result(60)
    gate = Gate(monkeypatch)
    early = TransformersEngine(weights(smollm2))
    handle = early.submit(asked)
    gate.opened.set()
    before = handle.result(60)
    early.close()
    assert (before.token_ids, before.logprobs) == (after.token_ids, after.logprobs)
