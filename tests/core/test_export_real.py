"""Exports of real weights, compared with a file that llama.cpp's own tools made, and run by llama.cpp itself."""

from __future__ import annotations

import json
import os
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from calpaca.core.export.check import TEXTS  # noqa: E402
from calpaca.core.export.gguf_export import GgufOptions, export_gguf  # noqa: E402
from calpaca.core.files import AdapterFiles, ModelFiles  # noqa: E402
from calpaca.core.golden import CONVERSATIONS  # noqa: E402
from calpaca.core.jobs import Ledger  # noqa: E402
from calpaca.core.spec import ModelSpec  # noqa: E402
from calpaca.core.template import choose_template  # noqa: E402
from calpaca.core.tokenizer import load_tokenizer  # noqa: E402

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def files_of(folder: Path) -> ModelFiles:
    return ModelFiles(folder.name, ModelSpec(model=str(folder)), folder, (), folder, None)


def exported(folder: Path, output: Path, kind: str, jobs: Path) -> tuple[Path, Any]:
    _, check = export_gguf(files_of(folder), output, Ledger(jobs), GgufOptions(kind))
    return output / f"model-{kind}.gguf", check


@pytest.fixture(scope="module")
def smollm2_f16(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("export")
    return exported(smollm2, folder / "f16", "f16", folder / "jobs.sqlite")


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_names_shapes_and_vocabulary_are_those_of_llama_cpps_converter(
    smollm2_f16: tuple[Path, Any], smollm2_gguf: Path
) -> None:
    """The embedded model came as a GGUF file; its Hugging Face form goes back to what it was, but for 4 bits."""
    file, check = smollm2_f16
    assert check.relative == 0
    assert check.agreement == 1
    ours, theirs = (gguf.GGUFReader(each) for each in (file, smollm2_gguf))
    assert {t.name: t.shape.tolist() for t in ours.tensors} == {t.name: t.shape.tolist() for t in theirs.tensors}
    made, told = fields(file), fields(smollm2_gguf)
    described = {"general.name", "general.organization", "general.finetune", "general.basename", "general.languages"}
    described |= {"general.license", "general.file_type", "GGUF.kv_count"}
    different = {key for key in made.keys() | told.keys() if key not in described and made.get(key) != told.get(key)}
    assert different == {"tokenizer.ggml.add_eos_token"}  # it says nothing where we say no
    theirs_by_name = {tensor.name: tensor for tensor in theirs.tensors}
    for tensor in ours.tensors:
        other = theirs_by_name[tensor.name]
        expected = gguf.quants.dequantize(other.data, other.tensor_type).astype(np.float16)
        assert (np.array(tensor.data, dtype=np.float16) == expected).all()


@contextmanager
def llama_cpp(file: Path, adapter: Path | None = None) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """llama.cpp's own server in this process, where its bindings are installed."""
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(parameters)

    def ask(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    yield ask


def texts() -> list[str]:
    if not DATA.is_dir():
        pytest.skip("the shared test data (../shared/data) is not here")
    found = [(DATA / "doc.txt").read_text(encoding="utf-8"), *TEXTS]
    for name in ("cmrc2018_trial.json", "xquad_zh_first24.json", "xquad_en_first24.json"):
        articles = json.loads((DATA / name).read_text(encoding="utf-8"))["data"]
        found += [paragraph["context"] for article in articles[:20] for paragraph in article["paragraphs"]]
    return found


def check_ids(ask: Callable[[str, dict[str, Any]], Any], folder: Path, chosen: list[str]) -> None:
    tokenizer = load_tokenizer(folder)
    for text in chosen:
        found = ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        assert found == tokenizer.encode(text, special_tokens=True), text


def test_llama_cpp_gives_the_same_ids_and_answers(smollm2_f16: tuple[Path, Any], smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(smollm2)
    template = choose_template(tokenizer)
    with llama_cpp(smollm2_f16[0]) as ask:
        check_ids(ask, smollm2, [*texts(), *map(template.render, CONVERSATIONS.values())])
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        for prompt in ("The capital of France is", template.render(CONVERSATIONS["single turn"])):
            ids = tokenizer.encode(prompt, special_tokens=True)
            answer = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=0)
            greedy = {"prompt": ids, "n_predict": 16, "temperature": 0, "return_tokens": True}
            assert ask("/completion", greedy)["tokens"] == answer[0, len(ids) :].tolist()


@pytest.fixture
def quantizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's quantizer on the PATH: the program, or its library called by a program of ours."""
    if shutil.which("llama-quantize"):
        return
    if not Path(os.environ.get("LIBLLAMA", "")).is_file():
        pytest.skip("neither llama-quantize on the PATH nor a library of llama.cpp in LIBLLAMA (llama_quantize.py)")
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "llama_quantize.py"} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q4_k_m", "q6_k"])
def test_k_quants_of_llama_cpp_itself_keep_ids_and_nearly_all_answers(
    smollm2: Path, tmp_path: Path, quantizer: None, kind: str
) -> None:
    file, check = exported(smollm2, tmp_path / kind, kind, tmp_path / "jobs.sqlite")
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert {"q4_k_m": "Q4_K", "q6_k": "Q6_K"}[kind] in types
    assert check.agreement > 0.8
    with llama_cpp(file) as ask:
        check_ids(ask, smollm2, TEXTS)
        prompt = load_tokenizer(smollm2).encode("The capital of France is", special_tokens=True)
        answer = ask("/completion", {"prompt": prompt, "n_predict": 3, "temperature": 0})
        assert "Paris" in answer["content"]


@pytest.mark.slow
def test_llama_cpp_gives_the_ids_of_a_merged_chinese_vocabulary(tmp_path: Path, merged: Path) -> None:
    """49,953 pieces of which 17,953 share one score: where other conversions go wrong."""
    from transformers import LlamaConfig, LlamaForCausalLM

    pieces = merged / "tokenizer.model"
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=50_000,
        max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "chinese")
    (tmp_path / "chinese" / "tokenizer.model").write_bytes(pieces.read_bytes())
    file, _ = exported(tmp_path / "chinese", tmp_path / "gguf", "q8_0", tmp_path / "jobs.sqlite")
    with llama_cpp(file) as ask:
        check_ids(ask, tmp_path / "chinese", [*texts(), "<s>[INST] 你好 [/INST] ok</s><s>"])


@pytest.mark.slow
def test_llama_cpp_gives_the_ids_of_qwen2(qwen: Path, tmp_path: Path) -> None:
    file, check = exported(qwen, tmp_path / "gguf", "q8_0", tmp_path / "jobs.sqlite")
    assert check.relative < 0.1
    with llama_cpp(file) as ask:
        check_ids(ask, qwen, texts())


@pytest.mark.slow
def test_llama_cpp_computes_with_a_lora_file(smollm2: Path, smollm2_f16: tuple[Path, Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from calpaca.core.export.lora import export_lora

    torch.manual_seed(4)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, use_rslora=True, rank_pattern={"q_proj": 4}, target_modules=targets
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(tmp_path / "lora")
    files = ModelFiles("smollm2", ModelSpec(), smollm2, (AdapterFiles("lora", tmp_path / "lora"),), smollm2, None)
    export_lora(files, tmp_path / "gguf", Ledger(tmp_path / "jobs.sqlite"), base_name="smollm2")
    tokenizer = load_tokenizer(smollm2)
    ids = tokenizer.encode("The capital of France is")
    greedy = {"prompt": ids, "n_predict": 12, "temperature": 0, "return_tokens": True}
    expected = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    with llama_cpp(smollm2_f16[0], tmp_path / "gguf" / "adapter-f32.gguf") as ask:
        assert ask("/completion", greedy)["tokens"] == expected[0, len(ids) :].tolist()
