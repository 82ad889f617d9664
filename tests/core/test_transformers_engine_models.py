"""Models of several kinds, small and random, through the transformers engine: the same tokens as from `generate`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calpaca.core.engine import Request, Sampling
from calpaca.core.engines.decoder import Decoder, HubDecoder, LlamaDecoder, SerialDecoder
from calpaca.core.engines.transformers import TransformersEngine
from calpaca.core.errors import ContextOverflowError
from calpaca.core.tokenizer import load_tokenizer
from calpaca.core.weights import LoadedWeights

torch = pytest.importorskip("torch")

PROMPTS = ([5, 9, 300], [7] * 40 + [8, 1], list(range(100, 190)), [4])


def small(kind: str, **changes: Any) -> Any:
    """A model with random weights."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": 49152, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(3)
    with torch.device("cpu"):
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def expected(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("model", "decoder"),
    [
        (lambda: small("Llama"), LlamaDecoder),
        (lambda: small("Llama", attention_bias=True, num_key_value_heads=4), LlamaDecoder),
        (lambda: small("Qwen2"), LlamaDecoder),
        (lambda: small("Mistral", sliding_window=None), LlamaDecoder),
        (lambda: small("Llama", rope_parameters=YARN), LlamaDecoder),
        (lambda: small("Llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), LlamaDecoder),
        (lambda: small("Mistral", sliding_window=16), HubDecoder),
        (lambda: small("Qwen3"), HubDecoder),
        (lambda: small("Phi3"), HubDecoder),
        (lambda: small("Gemma2", query_pre_attn_scalar=8, sliding_window=16), SerialDecoder),
    ],
    ids=["llama", "biased", "qwen2", "mistral", "yarn", "linear", "windowed", "qwen3", "phi3", "gemma2"],
)  # fmt: skip
def test_tokens_equal_those_of_generate(model: Callable[[], Any], decoder: type[Decoder], smollm2: Path) -> None:
    reference = model()
    wanted = [expected(reference, prompt) for prompt in PROMPTS]
    weights = LoadedWeights(copy.deepcopy(reference), load_tokenizer(smollm2), 49152, 512, ())
    engine = TransformersEngine(weights)
    try:
        assert type(engine.batch.decoder) is decoder
        handles = [engine.submit(Request(tuple(prompt), Sampling(max_new_tokens=20))) for prompt in PROMPTS]
        assert [list(handle.result(60).token_ids) for handle in handles] == wanted
    finally:
        engine.close()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scaling_that_changes_with_the_length_ends_at_the_trained_length_and_says_so(
    kind: str, smollm2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parameters: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 256}
    else:
        parameters |= {"original_max_position_embeddings": 256}
    reference = small("Llama", rope_parameters=parameters)
    wanted = [expected(reference, prompt) for prompt in PROMPTS]
    engine = TransformersEngine(LoadedWeights(copy.deepcopy(reference), load_tokenizer(smollm2), 49152, 512, ()))
    try:
        assert kind in caplog.text
        handles = [engine.submit(Request(tuple(prompt), Sampling(max_new_tokens=20))) for prompt in PROMPTS]
        assert [list(handle.result(60).token_ids) for handle in handles] == wanted
        with pytest.raises(ContextOverflowError, match="the context holds 256"):
            engine.submit(Request(tuple(range(250)), Sampling(max_new_tokens=20)))
    finally:
        engine.close()
