"""The loss: that of transformers on the same labels, and each packed example as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from calpaca_trainer.batches import BatchOptions, plan_batches
from calpaca_trainer.collator import IGNORED, Collator
from calpaca_trainer.labelled_loss import attach_loss


@pytest.fixture
def model(small):
    return AutoModelForCausalLM.from_pretrained(small, dtype="float32")


def example(number: int, length: int, learnt_from: int) -> dict:
    ids = np.random.default_rng(number).integers(100, 4000, length).astype("int32")
    return {"ids": ids, "marks": np.arange(length) >= learnt_from, "number": number}


EXAMPLES = [example(0, 21, 9), example(1, 33, 0), example(2, 10, 8)]


def gradients(model) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_loss_and_gradients_are_those_of_transformers(model) -> None:
    batch = Collator(0)([[each] for each in EXAMPLES])
    inputs = {name: batch[name] for name in ("input_ids", "labels")}
    theirs = model(**inputs, attention_mask=(torch.arange(40) < torch.tensor([[21], [33], [10]])).long())
    theirs.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    attach_loss(model)
    ours = model(**inputs)
    ours.loss.backward()
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    for ours_, theirs_ in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-6)


def test_without_labels_the_model_answers_as_before(model) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    attach_loss(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_a_batch_without_a_learnt_token_has_a_loss_of_zero_and_a_gradient(model) -> None:
    attach_loss(model)
    labels = torch.full((1, 8), IGNORED)
    loss = model(input_ids=torch.arange(8)[None], labels=labels, num_items_in_batch=1).loss
    loss.backward()
    assert loss.item() == 0


def test_packed_examples_do_not_see_each_other(model) -> None:
    attach_loss(model)
    alone = []
    for each in EXAMPLES:
        batch = Collator(0)([[each]])
        alone.append(model(input_ids=batch["input_ids"], labels=batch["labels"], num_items_in_batch=1).loss.item())
    batch = Collator(0, packing=True)([[EXAMPLES[0], EXAMPLES[1]], [EXAMPLES[2]]])
    assert batch["position_ids"][0, 21] == 0
    inputs = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
    assert model(**inputs, num_items_in_batch=1).loss.item() == pytest.approx(sum(alone), rel=1e-6)


def test_nothing_predicts_the_first_token_of_an_example() -> None:
    labels = Collator(0, packing=True)([[EXAMPLES[1], EXAMPLES[1]]])["labels"][0]
    assert labels[0] == labels[33] == IGNORED
    assert (labels[1:33] != IGNORED).all()


class Lengths:
    """What a plan needs to know of a dataset."""

    def __init__(self, lengths, weights=None) -> None:
        self.lengths = np.array(lengths)
        self.weight_of = np.ones(len(lengths)) if weights is None else np.array(weights)


def test_a_plan_has_every_example_once_an_epoch_and_follows_from_its_seed() -> None:
    dataset = Lengths(np.random.default_rng(1).integers(5, 100, 200))
    members = np.arange(200)
    options = BatchOptions(batch_size=4, max_length=128, seed=3)
    batches = plan_batches(dataset, members, options, epochs=2)
    numbers = [number for batch in batches for pack in batch for number in pack]
    assert sorted(numbers[:200]) == sorted(numbers[200:]) == list(range(200))
    assert batches == plan_batches(dataset, members, options, epochs=2)
    assert batches != plan_batches(dataset, members, BatchOptions(4, 128, seed=4), epochs=2)


def test_rows_of_a_batch_are_of_like_length() -> None:
    dataset = Lengths(np.random.default_rng(1).integers(5, 1000, 512))
    batches = plan_batches(dataset, np.arange(512), BatchOptions(8, 1024), epochs=1)
    padded = sum(8 * max(dataset.lengths[number] for (number,) in batch) for batch in batches)
    assert padded < 1.05 * dataset.lengths.sum()


def test_a_weight_says_how_often_a_source_is_seen() -> None:
    dataset = Lengths([10] * 300, [2.0] * 100 + [0.25] * 200)
    batches = plan_batches(dataset, np.arange(300), BatchOptions(1, 16), epochs=4)
    numbers = np.array([number for batch in batches for (number,) in batch])
    assert (numbers < 100).sum() == 800
    assert 150 < (numbers >= 100).sum() < 250


def test_packs_fill_their_rows() -> None:
    dataset = Lengths(np.random.default_rng(1).integers(5, 60, 400))
    batches = plan_batches(dataset, np.arange(400), BatchOptions(4, 128, packing=True), epochs=1)
    packs = [pack for batch in batches for pack in batch]
    filled = [sum(dataset.lengths[number] for number in pack) for pack in packs]
    assert max(filled) <= 128
    assert sum(filled) > 0.95 * 128 * len(packs)


def test_steps_are_counted_in_accumulated_batches() -> None:
    options = BatchOptions(2, 16, accumulation=3)
    assert len(plan_batches(Lengths([10] * 4), np.arange(4), options, epochs=1, max_steps=5)) == 15
