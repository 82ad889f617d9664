"""Several LoRA adapters live on one model: each request gets its own, and what cannot run that way is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calpaca.core.engine import AdapterEngine, Completion, Request, Sampling
from calpaca.core.engines.transformers import TransformersEngine
from calpaca.core.errors import AdapterError, CalpacaError, UnsupportedError
from calpaca.core.files import AdapterFiles, ModelFiles
from calpaca.core.spec import ModelSpec
from calpaca.core.weights import LoadedWeights, load_weights

torch = pytest.importorskip("torch")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECIPES: dict[str, dict[str, Any]] = {
    "wide": {"r": 8, "target_modules": LINEAR},
    "narrow": {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "deep": {"r": 16, "target_modules": ["down_proj", "up_proj"], "alpha_pattern": {"down_proj": 4}},
    "strong": {"r": 2, "lora_alpha": 32, "target_modules": LINEAR},
}
PROMPTS = ("The llama lives in", "A list of colours: red,", "One day", "The sum of two and two is")


def weights(smollm2: Path) -> LoadedWeights:
    return load_weights(ModelFiles("smollm2", ModelSpec(device="cpu", dtype="float32"), smollm2, (), smollm2, None))


@pytest.fixture(scope="module")
def tuned(smollm2: Path) -> Any:
    """The model with all adapters on it, as PEFT runs it one at a time."""
    from peft import LoraConfig, get_peft_model

    model: Any = None
    for number, (name, recipe) in enumerate(RECIPES.items()):
        config = LoraConfig(task_type="CAUSAL_LM", lora_alpha=recipe.get("lora_alpha", 16), **{
            key: value for key, value in recipe.items() if key != "lora_alpha"
        })  # fmt: skip
        if model is None:
            model = get_peft_model(weights(smollm2).model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        torch.manual_seed(number)
        for key, parameter in model.named_parameters():
            if "lora_" in key and f".{name}." in key:
                torch.nn.init.normal_(parameter.data, std=0.03)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tuned: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return {name: folder / name for name in RECIPES}


@pytest.fixture(scope="module")
def engine(smollm2: Path, folders: dict[str, Path]) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(weights(smollm2))
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    yield engine
    engine.close()


def ask(engine: TransformersEngine, prompt: str, adapter: str | None, new_tokens: int = 10) -> Completion:
    sampling = Sampling(max_new_tokens=new_tokens, logprobs=5)
    return engine.submit(Request(prompt, sampling, adapter=adapter)).result(120)


def peft(tuned: Any, ids: list[int], adapter: str | None) -> Any:
    """Log probabilities [vocabulary] of the token after `ids`."""
    with torch.inference_mode():
        if adapter is None:
            with tuned.disable_adapter():
                logits = tuned(input_ids=torch.tensor([ids])).logits
        else:
            tuned.set_adapter(adapter, inference_mode=True)
            logits = tuned(input_ids=torch.tensor([ids])).logits
    return torch.log_softmax(logits[0, -1], dim=-1)


def test_the_engine_has_the_optional_methods(engine: TransformersEngine) -> None:
    assert isinstance(engine, AdapterEngine)
    assert engine.capabilities().adapters


@pytest.mark.parametrize("adapter", [None, *RECIPES])
def test_probabilities_equal_those_of_peft(engine: TransformersEngine, tuned: Any, adapter: str | None) -> None:
    answer = ask(engine, PROMPTS[0], adapter, 4)
    expected = peft(tuned, engine.encode(PROMPTS[0]), adapter)
    first = answer.logprobs[0]
    assert [index for index, _, _ in first.top] == expected.topk(5).indices.tolist()
    assert [value for _, _, value in first.top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("adapter", ["wide", "deep"])
def test_a_model_loaded_with_an_adapter_gives_the_probabilities_of_peft(
    smollm2: Path, tuned: Any, folders: dict[str, Path], adapter: str
) -> None:
    files = (AdapterFiles(adapter, folders[adapter]),)
    spec = ModelSpec(device="cpu", dtype="float32")
    engine = TransformersEngine(load_weights(ModelFiles("smollm2", spec, smollm2, files, smollm2, None)))
    top = ask(engine, PROMPTS[0], None, 1).logprobs[0].top
    expected = peft(tuned, engine.encode(PROMPTS[0]), adapter)
    assert [value for *_, value in top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-4)
    engine.load_adapter("live", folders["strong"])
    assert ask(engine, PROMPTS[0], "live", 1).logprobs[0].top != top
    engine.close()


def test_sixteen_requests_at_once_never_mix_their_adapters(engine: TransformersEngine) -> None:
    asked = [(prompt, adapter) for prompt in PROMPTS for adapter in (None, "wide", "deep", "strong")]
    alone = [ask(engine, prompt, adapter).token_ids for prompt, adapter in asked]
    assert len(set(alone)) > len(PROMPTS)  # the adapters do change answers
    for _ in range(3):
        handles = [engine.submit(Request(prompt, Sampling(10), adapter=adapter)) for prompt, adapter in asked]
        assert [handle.result(120).token_ids for handle in handles] == alone


def test_a_beginning_is_not_shared_by_different_adapters(engine: TransformersEngine) -> None:
    prompt = "Once upon a time there was a llama that carried salt over the mountains. " * 6
    assert ask(engine, prompt, "wide", 1).usage.cached_tokens == 0
    assert ask(engine, prompt, "deep", 1).usage.cached_tokens == 0
    assert ask(engine, prompt, "wide", 1).usage.cached_tokens > 0


def test_a_scale_is_applied_and_0_leaves_the_base(engine: TransformersEngine, folders: dict[str, Path]) -> None:
    engine.load_adapter("none", folders["strong"], 0.0)
    engine.load_adapter("half", folders["strong"], 0.5)
    base, none, half = (ask(engine, PROMPTS[2], adapter, 1).logprobs[0].top for adapter in (None, "none", "half"))
    assert [value for *_, value in none] == pytest.approx([value for *_, value in base], abs=1e-5)
    assert half != ask(engine, PROMPTS[2], "strong", 1).logprobs[0].top
    for name in ("none", "half"):
        engine.unload_adapter(name)


def test_an_adapter_is_loaded_and_unloaded_while_others_run(
    engine: TransformersEngine, folders: dict[str, Path]
) -> None:
    expected = ask(engine, PROMPTS[1], "narrow", 40).token_ids
    running = engine.submit(Request(PROMPTS[1], Sampling(40), adapter="narrow"))
    engine.load_adapter("late", folders["narrow"])
    late = engine.submit(Request(PROMPTS[1], Sampling(40), adapter="late"))
    engine.unload_adapter("late")
    assert running.result(120).token_ids == late.result(120).token_ids == expected
    with pytest.raises(AdapterError, match=r"'late'.*Known: deep, narrow"):
        ask(engine, PROMPTS[1], "late")


def test_an_unknown_adapter_is_named_with_the_known_ones(engine: TransformersEngine) -> None:
    with pytest.raises(AdapterError, match="Did you mean 'strong'"):
        engine.submit(Request(PROMPTS[0], adapter="stronk"))


def test_unloading_the_last_adapter_leaves_the_layers_as_they_were(smollm2: Path, folders: dict[str, Path]) -> None:
    engine = TransformersEngine(weights(smollm2))
    ask(engine, PROMPTS[0], None, 1)  # the layers are packed by then
    before = type(engine.batch.decoder._layers[0].qkv)
    engine.load_adapter("one", folders["wide"])
    changed = type(engine.batch.decoder._layers[0].qkv)
    engine.unload_adapter("one")
    ask(engine, PROMPTS[0], None, 1)
    assert type(engine.batch.decoder._layers[0].qkv) is before is not changed
    engine.close()


@pytest.mark.filterwarnings("ignore")  # PEFT's, about making such adapters
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"trainable_token_indices": {"embed_tokens": [5]}}, "trainable_token_indices"),
        ({"lora_bias": True, "target_modules": ["o_proj"]}, "lora_bias"),
    ],
    ids=["dora", "saved", "embedding", "head", "tokens", "bias"],
)
def test_what_cannot_run_per_row_is_refused_by_name(
    engine: TransformersEngine, smollm2: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **options})
    get_peft_model(weights(smollm2).model, config).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(UnsupportedError, match=rf"{named}.*Merge it"):
        engine.load_adapter("odd", tmp_path)


def test_an_adapter_of_another_base_is_refused(engine: TransformersEngine, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=99))
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(CalpacaError, match="another base"):
        engine.load_adapter("other", tmp_path)
