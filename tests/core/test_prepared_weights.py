"""Weights for native engines: made once from whatever a model consists of, adapters merged into them."""

from __future__ import annotations

import json
import logging
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from calpaca.core.engine import Engine, Request, Sampling  # noqa: E402
from calpaca.core.engines.native import NativeEngine, attended_length  # noqa: E402
from calpaca.core.engines.prepared import gguf_weights, gguf_with_lora  # noqa: E402
from calpaca.core.engines.retyped import matrix_types  # noqa: E402
from calpaca.core.errors import MissingExtraError, UnsupportedError  # noqa: E402
from calpaca.core.files import AdapterFiles, ModelFiles  # noqa: E402
from calpaca.core.registry import load_target  # noqa: E402
from calpaca.core.runtime import Runtime  # noqa: E402
from calpaca.core.spec import ModelSpec  # noqa: E402

PROMPTS = ("Once upon a time", "The llama", "1 2 3 4", "Water", "你好，世界")
PACKAGES = {"openvino": "openvino_genai", "llama_cpp": "xllamacpp"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A small random Llama with SmolLM2's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((smollm2 / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes nearly every answer."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("adapter")
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def files_of(base: Path, *adapters: Path, **spec: Any) -> ModelFiles:
    found = tuple(AdapterFiles(each.name, each) for each in adapters)
    return ModelFiles(base.name, ModelSpec(model=str(base), device="cpu", **spec), base, found, base, None)


@pytest.fixture
def opened(sources_runtime: Runtime, own_cache: Path) -> Iterator[Callable[..., Engine]]:
    """Opens engines, and closes them."""
    engines: list[Engine] = []

    def open_engine(name: str, files: ModelFiles) -> Engine:
        pytest.importorskip(PACKAGES.get(name, "torch"))
        engines.append(load_target(f"calpaca.core.engines.{name}:open_engine", feature=name)(files, sources_runtime))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()


def answers(engine: Engine, prompts: Sequence[str] = PROMPTS) -> list[str]:
    return [engine.submit(Request(prompt, Sampling(max_new_tokens=6))).result(60).text for prompt in prompts]


@pytest.mark.parametrize("name", ["openvino", "llama_cpp"])
def test_an_adapter_changes_the_answers_as_in_transformers(
    name: str, base: Path, adapter: Path, opened: Callable[..., Engine]
) -> None:
    plain = answers(opened(name, files_of(base, dtype="float32")))
    adapted = answers(opened(name, files_of(base, adapter, dtype="float32")))
    expected = answers(opened("transformers", files_of(base, adapter, dtype="float32")))
    assert adapted == expected
    assert all(a != b for a, b in zip(plain, adapted, strict=True))


@pytest.fixture(scope="module")
def base_gguf(base: Path, sources_runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a GGUF file of the user's own, in float32."""
    from calpaca.core.checkpoint.write import write_model
    from calpaca.core.export.gguf_export import GgufOptions, plan_gguf

    folder = tmp_path_factory.mktemp("gguf") / "base"
    write_model(plan_gguf(files_of(base), GgufOptions("f32")).model, folder, sources_runtime.jobs)
    return next(folder.glob("*.gguf"))


def files_on(own: Path, base: Path, *adapters: AdapterFiles, **spec: Any) -> ModelFiles:
    """A GGUF file under adapters; `base` is the same model as a folder."""
    return ModelFiles(base.name, ModelSpec(model=str(own), device="cpu", **spec), base, adapters, base, None)


def make_adapter(base: Path, folder: Path, seed: int, std: float = 0.15, **config: Any) -> Path:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "up_proj"]} | config
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    model.save_pretrained(folder)
    return folder


def test_llama_cpp_puts_stacked_and_scaled_lora_on_a_gguf_file_as_if_merged(
    base: Path, base_gguf: Path, adapter: Path, tmp_path: Path, opened: Callable[..., Engine], sources_runtime: Runtime
) -> None:
    other = make_adapter(base, tmp_path / "other", 2, use_rslora=True)
    stacked = (AdapterFiles("one", adapter, 0.5), AdapterFiles("two", other, 1.5))
    files = files_on(base_gguf, base, *stacked, dtype="float32")
    weights, lora = gguf_with_lora(files, sources_runtime, "llama_cpp", frozenset({"F32"}))
    assert weights == base_gguf
    assert [each.scale for each in lora] == [0.5, 1.5]
    prompts = [f"{number} {text}" for text in PROMPTS for number in (1, 2)]
    on_top, merged, once = (
        answers(opened(name, each), prompts)
        for name, each in (
            ("llama_cpp", files),
            ("transformers", files),
            ("transformers", replace(files, adapters=tuple(replace(each, scale=1.0) for each in stacked))),
        )
    )
    assert on_top == merged
    assert on_top != once  # the scales matter


def test_a_lora_file_is_written_once_and_has_no_scale_in_it(
    base: Path, base_gguf: Path, adapter: Path, sources_runtime: Runtime, own_cache: Path
) -> None:
    paths = []
    for scale in (1.0, 0.25):
        files = files_on(base_gguf, base, AdapterFiles("adapter", adapter, scale))
        (lora,) = gguf_with_lora(files, sources_runtime, "llama_cpp")[1]
        paths.append((lora.path, lora.path.stat().st_mtime_ns))
    assert paths[0] == paths[1]
    assert paths[0][0].is_relative_to(own_cache)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_is_more_than_lora_is_merged(
    more: dict[str, Any], base: Path, base_gguf: Path, tmp_path: Path, sources_runtime: Runtime, own_cache: Path
) -> None:
    adapter = AdapterFiles("more", make_adapter(base, tmp_path / "more", 3, **more))
    weights, lora = gguf_with_lora(files_on(base_gguf, base, adapter), sources_runtime, "llama_cpp")
    assert lora == ()
    assert weights.is_relative_to(own_cache)


def test_weights_are_prepared_once_for_each_content(
    base: Path, adapter: Path, sources_runtime: Runtime, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "calpaca")
    first = gguf_weights(files_of(base), sources_runtime, "llama_cpp")
    assert "Preparing" in caplog.text
    caplog.clear()
    written = first.stat().st_mtime_ns
    assert gguf_weights(files_of(base), sources_runtime, "openvino", frozenset({"F16"})) == first
    assert (first.stat().st_mtime_ns, caplog.text) == (written, "")
    others = [files_of(base, adapter), files_of(base, quantization="8bit"), files_of(base, dtype="float32")]
    paths = {gguf_weights(each, sources_runtime, "llama_cpp") for each in others}
    assert len(paths | {first}) == 4
    assert matrix_types(first) == {"F16"}


def test_a_file_of_ones_own_is_taken_as_it_is(smollm2: Path, smollm2_gguf: Path, sources_runtime: Runtime) -> None:
    files = ModelFiles("smollm2", ModelSpec(model=str(smollm2_gguf)), smollm2, (), smollm2, None)
    assert gguf_weights(files, sources_runtime, "llama_cpp") == smollm2_gguf


def test_a_type_that_is_read_inexactly_is_written_again(
    smollm2: Path, smollm2_gguf: Path, sources_runtime: Runtime, own_cache: Path
) -> None:
    files = ModelFiles("smollm2", ModelSpec(model=str(smollm2_gguf)), smollm2, (), smollm2, None)
    weights = gguf_weights(files, sources_runtime, "openvino", frozenset({"F16", "Q8_0"}))
    assert weights.is_relative_to(own_cache)
    assert matrix_types(smollm2_gguf) >= {"Q4_1"} and matrix_types(weights) == {"F16"}
    assert not list(weights.parent.glob(".*"))


@pytest.mark.parametrize("name", ["openvino", "llama_cpp"])
def test_what_an_engine_cannot_do_for_a_model_is_refused_by_name(
    name: str, base: Path, opened: Callable[..., Engine]
) -> None:
    for spec, said in (({"device": "cuda"}, "cuda"), ({"quantization": "4bit"}, "4bit")):
        files = files_of(base)
        with pytest.raises(UnsupportedError, match=said):
            opened(name, ModelFiles(files.name, files.spec.model_copy(update=spec), base, (), base, None))


@pytest.mark.parametrize("name", ["openvino", "llama_cpp"])
def test_a_missing_package_is_told_with_its_install_line(
    name: str, base: Path, sources_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    extra = name.replace("_", "-")
    with pytest.raises(MissingExtraError, match=rf"pip install 'calpaca\[{extra}\]'"):
        load_target(f"calpaca.core.engines.{name}:open_engine", feature=name)(files_of(base), sources_runtime)


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
    },
}  # fmt: skip


@pytest.fixture
def scaled(smollm2: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`scaled(kind)` makes a small random Llama that looks at positions much."""

    def make(kind: str) -> Path:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, initializer_range=0.15,
            rope_parameters={"rope_type": kind, "rope_theta": 10_000.0, **SCALINGS.get(kind, {})},
        )  # fmt: skip
        LlamaForCausalLM(config).half().save_pretrained(tmp_path / kind)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (tmp_path / kind / name).write_bytes((smollm2 / name).read_bytes())
        return tmp_path / kind

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SCALINGS))
def test_scaled_rotary_positions_are_those_of_transformers_in_llama_cpp(
    kind: str, scaled: Callable[[str], Path], opened: Callable[..., Engine]
) -> None:
    prompts = [f"{'Once upon a time there was a llama who lived ' * 6}{number}" for number in range(4)]
    files = files_of(scaled(kind), dtype="float32")
    ours, theirs = (answers(opened(name, files), prompts) for name in ("llama_cpp", "transformers"))
    assert ours == theirs
    assert theirs != answers(opened("transformers", files_of(scaled("default"), dtype="float32")), prompts)


LEFT_OUT = {kind: ({"rope_scaling": {"type": kind}}, f"the rotary scaling '{kind}'") for kind in (*SCALINGS, "dynamic")}
LEFT_OUT["biases"] = ({"attention_bias": True}, "the biases of attention")


@pytest.mark.parametrize(("config", "named"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_openvino_would_leave_out_in_silence_is_refused_by_name(
    config: dict[str, Any], named: str, tmp_path: Path, opened: Callable[..., Engine]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=f"leaves out {named} of {tmp_path.name}"):
        opened("openvino", files_of(tmp_path))


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"sliding_window": 64}, 64),
        ({"sliding_window": 64, "use_sliding_window": False}, 256),
        ({"sliding_window": None}, 256),
        ({"sliding_window": 4096}, 256),
    ],
    ids=["window", "unused", "none", "wide"],
)
def test_a_window_that_native_libraries_do_not_have_ends_the_context(
    config: dict[str, Any], length: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert attended_length(files_of(tmp_path), 256) == length
    assert ("looks back 64 tokens" in caplog.text) == (length == 64)


def resident(pid: int) -> int:
    """Bytes of memory that a process has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("openvino", 32 << 20), ("llama_cpp", 16 << 20)])
def test_memory_is_flat_over_1000_requests(name: str, most: int, base: Path, opened: Callable[..., Engine]) -> None:
    """OpenVINO's process grows a little with steps of other sizes; with the same steps over and over it does not."""
    engine = opened(name, files_of(base, dtype="float32"))
    assert isinstance(engine, NativeEngine) and engine.worker.pid is not None
    processes = (os.getpid(), engine.worker.pid)

    def ask(waves: int) -> None:
        for _ in range(waves):
            handles = [engine.submit(Request(f"{seed} llamas", Sampling(max_new_tokens=4))) for seed in range(100)]
            assert all(handle.result(60).usage.completion_tokens for handle in handles)

    ask(5)  # what is kept of these prompts is there by then
    before = [resident(process) for process in processes]
    ask(10)
    grown = [resident(process) - first for process, first in zip(processes, before, strict=True)]
    assert grown[0] < 16 << 20
    assert grown[1] < most
