"""Memory needed, against what loaded models really take."""

from __future__ import annotations

from pathlib import Path

import pytest

from calpaca.core.memory import memory_needs
from calpaca.core.model_facts import read_facts

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}  # fmt: skip


def test_a_7b_model_needs_what_everybody_knows() -> None:
    shapes = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096), "model.norm.weight": (4096,)}
    for layer in range(32):
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"}
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj.weight": (11008, 4096) for name in ("gate", "up")}
        shapes |= {f"model.layers.{layer}.mlp.down_proj.weight": (4096, 11008)}
        shapes |= {f"model.layers.{layer}.{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    needs = {need.dtype: need for need in memory_needs(shapes, LLAMA_7B)}
    assert needs["float32"].weights == 4 * 6_738_415_616
    assert needs["bfloat16 or float16"].weights == 2 * 6_738_415_616
    assert needs["bfloat16 or float16"].cache == 2 << 30
    assert needs["float32"].cache == 4 << 30
    assert 7.0e9 < needs["8bit"].weights < 7.1e9
    assert 4.1e9 < needs["4bit"].weights < 4.3e9


def test_grouped_queries_need_less_cache() -> None:
    grouped = {**LLAMA_7B, "num_key_value_heads": 8, "head_dim": 128}
    cache = [memory_needs({"w": (1,)}, config)[0].cache for config in (LLAMA_7B, grouped)]
    assert cache[0] == 4 * cache[1]


def test_encoders_and_unknown_models_have_no_cache() -> None:
    assert memory_needs({"w": (1,)}, {**LLAMA_7B, "architectures": ["BertModel"]})[0].cache is None
    assert memory_needs({"w": (1,)}, {})[0].cache is None


def test_a_tied_output_layer_that_is_stored_counts_once() -> None:
    shapes = {"model.embed_tokens.weight": (10, 4), "lm_head.weight": (10, 4)}
    assert memory_needs(shapes, {"tie_word_embeddings": True})[0].weights == 160
    assert memory_needs(shapes, {"tie_word_embeddings": False})[0].weights == 320


def test_a_loaded_model_and_its_cache_take_what_is_told(smollm2: Path, smollm2_gguf: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    facts = read_facts(smollm2)
    told = {need.dtype: need for need in memory_needs(facts.shapes, facts.config)}
    from_gguf = read_facts(smollm2_gguf)
    assert told == {need.dtype: need for need in memory_needs(from_gguf.shapes, from_gguf.config)}
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert sum(each.numel() * each.element_size() for each in model.parameters()) == told["float32"].weights
    with torch.inference_mode():
        cache = model(torch.tensor([[5, 6, 7, 8]]), use_cache=True).past_key_values
    values = sum(each.keys.numel() + each.values.numel() for each in cache.layers)
    assert told["float32"].cache == values * 4 * 8192 // 4
