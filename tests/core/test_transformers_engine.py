"""The transformers engine on real weights: the contract of every engine, and what only this one promises."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calpaca.core.engine import Grammar, Request, Sampling
from calpaca.core.engines.transformers import TransformersEngine, open_engine
from calpaca.core.errors import CorruptFileError, ModelError, UnsupportedError, UsageError
from calpaca.core.files import ModelFiles
from calpaca.core.model import Model
from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec
from calpaca.core.template import named_template
from calpaca.core.tokenizer import load_tokenizer
from calpaca.core.weights import load_weights
from calpaca.testing import EngineContract


def model_files(folder: Path, **spec: object) -> ModelFiles:
    return ModelFiles("smollm2", ModelSpec(**spec), folder, (), folder, None)


@pytest.fixture(scope="module")
def smollm2_engine(smollm2: Path) -> Iterator[TransformersEngine]:
    engine = open_engine(model_files(smollm2, device="cpu", dtype="float32"), Runtime(Settings()))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Any:
    """The model as transformers runs it; an engine takes its own over."""
    return load_weights(model_files(smollm2, device="cpu", dtype="float32")).model


class TestContract(EngineContract):
    @pytest.fixture
    def engine(self, smollm2_engine: TransformersEngine) -> TransformersEngine:
        return smollm2_engine


def greedy(engine: TransformersEngine, prompt: str, new_tokens: int) -> list[int]:
    request = Request(prompt, Sampling(max_new_tokens=new_tokens))
    return list(engine.submit(request).result().token_ids)


def test_greedy_tokens_equal_those_of_generate(smollm2_engine: TransformersEngine, reference: Any) -> None:
    import torch

    prompt = "The llama lives in the mountains of"
    ids = torch.tensor([smollm2_engine.encode(prompt)])
    with torch.inference_mode():
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert greedy(smollm2_engine, prompt, 24) == expected[0, ids.shape[1] :].tolist()


def test_repetition_penalty_equals_that_of_generate(smollm2_engine: TransformersEngine, reference: Any) -> None:
    import torch

    ids = torch.tensor([smollm2_engine.encode("one two three one two three one")])
    options = {"max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.3}
    with torch.inference_mode():
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
    request = Request(tuple(ids[0].tolist()), Sampling(max_new_tokens=16, repetition_penalty=1.3))
    assert list(smollm2_engine.submit(request).result().token_ids) == expected[0, ids.shape[1] :].tolist()


def test_requests_that_join_a_running_batch_get_the_tokens_they_get_alone(smollm2_engine: TransformersEngine) -> None:
    prompts = [
        "Once upon a time",
        "The capital of France is",
        "1, 2, 3, 4,",
        "Llamas and alpacas are animals that " * 20,
    ]
    alone = [greedy(smollm2_engine, prompt, 20) for prompt in prompts]
    handles = []
    for prompt in prompts:
        handles.append(smollm2_engine.submit(Request(prompt, Sampling(max_new_tokens=20))))
        time.sleep(0.1)  # the ones before are under way
    assert [list(handle.result().token_ids) for handle in handles] == alone


def test_a_cancelled_request_leaves_the_batch_and_the_others_go_on(smollm2_engine: TransformersEngine) -> None:
    prompt = "A list of animals: cat, dog,"
    alone = greedy(smollm2_engine, prompt, 30)
    handles = [smollm2_engine.submit(Request(prompt, Sampling(max_new_tokens=30))) for _ in range(4)]
    for handle in handles[:3]:
        next(iter(handle))
        handle.cancel()
    assert list(handles[3].result().token_ids) == alone
    assert {handle.result().finish_reason for handle in handles[:3]} <= {"cancelled", "length"}
    deadline = time.monotonic() + 2  # a reader may learn of the end a moment before the batch is tidied up
    while smollm2_engine.batch.rows and time.monotonic() < deadline:
        time.sleep(0.01)
    assert smollm2_engine.batch.rows == []


def test_ids_outside_the_vocabulary_are_refused(smollm2_engine: TransformersEngine) -> None:
    with pytest.raises(UsageError, match="outside the vocabulary"):
        smollm2_engine.submit(Request((10**6,)))


def test_a_closed_engine_refuses_requests(smollm2: Path) -> None:
    engine = open_engine(model_files(smollm2, device="cpu"), Runtime(Settings()))
    running = engine.submit(Request("Once", Sampling(max_new_tokens=400)))
    engine.close()
    assert running.result(timeout=5).finish_reason in {"cancelled", "stop"}
    with pytest.raises(ModelError, match="closed"):
        engine.submit(Request("Hello"))


def test_a_model_without_a_template_says_which_ones_there_are(smollm2: Path, tmp_path: Path) -> None:
    folder = copy_of(smollm2, tmp_path)
    (folder / "chat_template.jinja").unlink()
    engine = open_engine(model_files(folder, device="cpu"), Runtime(Settings()))
    with pytest.raises(ModelError, match=r"no chat template.*alpaca"):
        engine.template.render([{"role": "user", "content": "Hello"}])
    engine.close()


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ({"device": "tpu"}, UsageError, "Unknown device"),
        ({"dtype": "int3"}, UsageError, "Unknown dtype"),
        ({"device": "cpu", "quantization": "4bit"}, UnsupportedError, "needs a CUDA device"),
        ({"quantization": "3bit"}, UsageError, "Unknown quantization"),
    ],
)
def test_impossible_ways_to_run_are_named(smollm2: Path, spec: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        open_engine(model_files(smollm2, **spec), Runtime(Settings()))


def test_a_truncated_weights_file_is_named_with_its_size(smollm2: Path, tmp_path: Path) -> None:
    folder = copy_of(smollm2, tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match=rf"model\.safetensors \({len(whole) // 2} bytes\) is damaged"):
        open_engine(model_files(folder, device="cpu"), Runtime(Settings()))


def test_missing_tensors_are_no_random_ones(smollm2: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(smollm2, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"lacks 1 tensors.*layers\.3\.mlp\.up_proj"):
        open_engine(model_files(folder, device="cpu"), Runtime(Settings()))


def test_pickled_code_in_a_bin_file_is_refused_and_not_run(smollm2: Path, tmp_path: Path) -> None:
    import torch

    folder = copy_of(smollm2, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Touch(tmp_path / "touched")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_engine(model_files(folder, device="cpu"), Runtime(Settings()))
    assert not (tmp_path / "touched").exists()


def test_a_bin_folder_loads(smollm2: Path, tmp_path: Path, smollm2_engine: TransformersEngine) -> None:
    import torch
    from safetensors.torch import load_file

    folder = copy_of(smollm2, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    engine = open_engine(model_files(folder, device="cpu", dtype="float32"), Runtime(Settings()))
    assert greedy(engine, "The capital of France is", 8) == greedy(smollm2_engine, "The capital of France is", 8)
    engine.close()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def copy_of(model: Path, tmp_path: Path) -> Path:
    """A folder of links to a model's files, any of which can be replaced."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    return folder


@pytest.fixture
def parrot(small_pieces: Path, tmp_path: Path) -> Iterator[Model]:
    """A Llama with a SentencePiece vocabulary whose likeliest token is always the same word with a space before it."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copy(small_pieces / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.zero_()
        llama.model.embed_tokens.weight.fill_(1.0)
        llama.model.norm.weight.fill_(1.0)
        llama.lm_head.weight[tokenizer.token_id("▁observatory")] = 1.0
    llama.save_pretrained(tmp_path)
    files = ModelFiles(
        "parrot", ModelSpec(device="cpu", dtype="float32"), tmp_path, (), tmp_path, named_template("llama2-zh")
    )
    engine = open_engine(files, Runtime(Settings()))
    yield Model("parrot", files.spec, engine, engine.template, files)
    engine.close()


def test_a_chats_answer_begins_without_the_space_of_sentencepiece(parrot: Model) -> None:
    sampling = Sampling(max_new_tokens=3)
    question = [{"role": "user", "content": "What is on the hill?"}]
    assert [chunk.text for chunk in parrot.chat(question, sampling)] == ["observatory", " observatory", " observatory"]
    assert parrot.generate("On the hill is the", sampling).result().text == " observatory observatory observatory"
    assert parrot.chat(question, Sampling(stop=("observatory o",))).result().text == ""
    ordered = Grammar("regex", " observatory")
    assert parrot.chat(question, sampling, grammar=ordered).result().text == " observatory"
