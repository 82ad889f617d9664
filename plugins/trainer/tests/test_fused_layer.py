"""The fused layer: what transformers and PEFT compute with the same weights, in every combination it takes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from calpaca_trainer.causal_attention import attend
from calpaca_trainer.elementwise import Elementwise, compiled
from calpaca_trainer.fused_layer import FusedLayer, fuse
from calpaca_trainer.metrics import read_metrics

IDS = torch.randint(100, 400, (2, 21), generator=torch.Generator().manual_seed(0))


def tiny(**changes: Any) -> LlamaForCausalLM:
    """Four heads that share two keys; biases everywhere."""
    values = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**values | changes)).train()


def adapted(model: Any, **changes: Any) -> Any:
    """A model with an adapter that changes something already."""
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": "all-linear"} | changes))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def learnt(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    """The loss, and the gradient of all that learns."""
    loss = model(input_ids=IDS, labels=IDS, use_cache=False, **inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


def check_same(model: Any, **inputs: Any) -> None:
    expected = learnt(copy.deepcopy(model), **inputs)
    assert fuse(model.get_base_model(), Elementwise())
    found = learnt(model, **inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="all"),
        pytest.param({"target_modules": ["q_proj", "v_proj"]}, id="some"),
        pytest.param({"target_modules": ["down_proj"], "layers_to_transform": [1]}, id="one layer"),
        pytest.param({"use_rslora": True, "lora_alpha": 3}, id="rslora"),
        pytest.param({"modules_to_save": ["embed_tokens"]}, id="embeddings"),
    ],
)
def test_losses_and_gradients_are_those_of_the_plain_layers(changes) -> None:
    check_same(adapted(tiny(), **changes))


def test_packed_rows_are_kept_apart() -> None:
    positions = torch.cat([torch.arange(9), torch.arange(12)]).repeat(2, 1)
    check_same(adapted(tiny()), position_ids=positions)


def test_a_padding_mask_is_obeyed() -> None:
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    check_same(adapted(tiny()), attention_mask=mask)


def test_checkpointing_changes_no_gradient() -> None:
    model = adapted(tiny())
    expected = learnt(copy.deepcopy(model))
    assert fuse(model.get_base_model(), Elementwise())
    model.get_base_model().activation_checkpointing_enable()
    for name, value in learnt(model).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=1e-6)


def test_an_adapter_that_is_switched_off_adds_nothing() -> None:
    model = adapted(tiny())
    assert fuse(model.get_base_model(), Elementwise())
    with model.disable_adapter(), torch.no_grad():
        found = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, tiny()(IDS).logits, rtol=1e-4, atol=1e-5)


def test_texts_are_written_with_a_cache_as_before(small: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(small, dtype="float32")).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    expected = model.generate(input_ids=IDS, **options)
    assert fuse(model.get_base_model(), Elementwise())
    assert torch.equal(model.generate(input_ids=IDS, **options), expected)


def test_in_bfloat16_the_gradient_points_the_same_way(small: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(small, dtype="bfloat16")).train()
    exact = learnt(copy.deepcopy(model).float())
    assert fuse(model.get_base_model(), Elementwise())
    found = learnt(model)
    assert found["loss"].item() == pytest.approx(exact["loss"].item(), rel=5e-3)
    first, second = (torch.cat([each.flatten() for n, each in all_.items() if n != "loss"]) for all_ in (found, exact))
    assert torch.cosine_similarity(first, second, dim=0) > 0.99


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"lora_dropout": 0.1}, {"modules_to_save": ["norm", "input_layernorm"]}]
)
def test_other_methods_keep_the_plain_layers(changes) -> None:
    model = adapted(tiny(), **changes)
    assert not fuse(model.get_base_model(), Elementwise())
    assert not any(isinstance(each, FusedLayer) for each in model.modules())


def test_other_activations_keep_the_plain_layers() -> None:
    assert not fuse(adapted(tiny(hidden_act="gelu")).get_base_model(), Elementwise())


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch uses what it advises against
def test_compiled_it_computes_the_same() -> None:
    model = adapted(tiny(attention_bias=False, mlp_bias=False))
    expected = learnt(copy.deepcopy(model))
    assert fuse(model.get_base_model(), compiled())
    for name, value in learnt(model).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch uses what it advises against
def test_a_compiled_run_has_the_losses_of_a_plain_one(run) -> None:
    plain, fused = (
        [each["loss"] for each in read_metrics(run(name, max_steps=2, compile=compile)) if "loss" in each]
        for name, compile in (("plain", False), ("compiled", True))
    )
    assert fused == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("length", [1, 100, 300])
def test_attention_in_blocks_is_attention(length: int) -> None:
    torch.manual_seed(0)
    heads = [torch.randn(2, length, n, 8, requires_grad=True) for n in (6, 3, 3)]
    slope = torch.randn(2, length, 6, 8)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(each.transpose(1, 2) for each in heads), is_causal=True, enable_gqa=True, scale=0.3
    ).transpose(1, 2)
    ours = attend(*heads, 0.3)
    torch.testing.assert_close(ours, plain)
    gradients = (torch.autograd.grad(result, heads, slope) for result in (ours, plain))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
