"""The estimate of memory: beside what autograd really keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from calpaca.core.merge.base_model import read_base
from calpaca_trainer.batches import most_tokens
from calpaca_trainer.estimate import estimate_memory
from calpaca_trainer.learner import load_learner
from calpaca_trainer.training import prepare


def kept_bytes(model: Any, ids: torch.Tensor) -> int:
    """What a forward pass leaves for the backward pass, the weights aside."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad  # the graph, and all that it keeps, is alive until here
    return sum(kept.values())


def test_as_much_is_kept_as_was_estimated(recipe, runtime) -> None:
    it = prepare(recipe(dtype="bfloat16"), "sft", runtime)
    learner = load_learner(it.recipe, it.files, it.prompting)
    base = read_base(it.files.weights)
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    estimate = estimate_memory(it.recipe, shapes, base.text_config, width=2, tokens=2 * 256)
    factors = sum(each.numel() * 2 for name, each in learner.trained() if ".lora_" in name)
    kept = kept_bytes(learner.model, torch.arange(512).view(2, 256)) - factors
    assert kept <= estimate.activations <= 1.8 * kept


def test_an_estimate_is_for_the_batches_that_there_are(recipe, runtime) -> None:
    it = prepare(recipe(max_length=8192), "sft", runtime)
    tokens = most_tokens(it.batches, it.dataset)
    assert tokens <= 2 * 88
    assert it.estimate == prepare(recipe(max_length=4096), "sft", runtime).estimate


def test_rows_are_counted_with_their_padding(recipe, runtime) -> None:
    it = prepare(recipe(), "sft", runtime)
    (number,) = it.batches[0][0]
    length = int(it.dataset.lengths[number])
    assert most_tokens([[(number,), (number,), (number,)]], it.dataset, multiple=64) == 3 * -(-length // 64) * 64
