"""Adapters for single requests on the native engines, with real weights: those of PEFT, never mixed, loaded in use."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from calpaca.core.engine import AdapterEngine, Request, Sampling
from calpaca.core.engines.native import NativeEngine
from calpaca.core.engines.prepared import gguf_weights
from calpaca.core.errors import AdapterError, CalpacaError, ModelError, UnsupportedError
from calpaca.core.files import ModelFiles
from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.slow

PROMPTS = ("The llama lives in", "A list of colours: red,", "One day", "The sum of two and two is")
PACKAGES = {"llama_cpp": "xllamacpp", "openvino": "openvino_genai"}
LONG = Sampling(max_new_tokens=60)


def make_adapter(smollm2: Path, folder: Path, seed: int, **config: Any) -> Path:
    """A random LoRA adapter that changes answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj", "v_proj", "down_proj"], **config}))
    torch.manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.06)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def folders(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(smollm2, folder / name, seed) for seed, name in enumerate(("red", "blue"))}


def files_of(smollm2: Path, own: Path) -> ModelFiles:
    return ModelFiles("smollm2", ModelSpec(model=str(own), device="cpu", dtype="float32"), smollm2, (), smollm2, None)


@pytest.fixture(scope="module")
def expected(smollm2: Path, folders: dict[str, Path]) -> dict[tuple[str, str | None], str]:
    """Answers by prompt and adapter, of the transformers engine, which is compared with PEFT elsewhere."""
    from calpaca.core.engines.transformers import open_engine

    reference = open_engine(files_of(smollm2, smollm2), Runtime(Settings()))
    for name, folder in folders.items():
        reference.load_adapter(name, folder)
    reference.load_adapter("half", folders["red"], 0.5)
    answers = {(prompt, name): ask(reference, prompt, name) for prompt in PROMPTS for name in (None, *folders, "half")}
    reference.close()
    return answers


@pytest.fixture(scope="module", params=list(PACKAGES))
def engine(
    request: pytest.FixtureRequest,
    smollm2: Path,
    smollm2_gguf: Path,
    folders: dict[str, Path],
    sources_runtime: Runtime,
) -> Iterator[NativeEngine]:
    """A native engine with both adapters beside the model."""
    from calpaca.core.engines import llama_cpp, openvino

    if find_spec(PACKAGES[request.param]) is None:
        pytest.skip(f"{PACKAGES[request.param]} is not installed")
    library = {"llama_cpp": llama_cpp, "openvino": openvino}[request.param]
    types = llama_cpp.TYPES["float32"] if library is llama_cpp else openvino.READ_EXACTLY
    files = files_of(smollm2, smollm2_gguf)
    opened = library.start_engine(files, gguf_weights(files, sources_runtime, library.NAME, types), sources_runtime)
    for name, folder in folders.items():
        opened.load_adapter(name, folder)
    yield opened
    opened.close()


def ask(engine: AdapterEngine, prompt: str, adapter: str | None) -> str:
    return engine.submit(Request(prompt, Sampling(max_new_tokens=10), adapter=adapter)).result(120).text


def settle(holds: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
        time.sleep(0.02)


def test_16_requests_at_once_get_the_answers_of_their_own_adapters(
    engine: NativeEngine, expected: dict[tuple[str, str | None], str]
) -> None:
    assert isinstance(engine, AdapterEngine)
    asked = [(prompt, name) for name in (None, "red", "blue", "red") for prompt in PROMPTS]
    assert len({expected[each] for each in asked}) > 2 * len(PROMPTS)  # the adapters do change answers
    for _ in range(3):
        handles = [engine.submit(Request(prompt, Sampling(10), adapter=name)) for prompt, name in asked]
        assert [handle.result(120).text for handle in handles] == [expected[each] for each in asked]


def test_a_beginning_that_is_kept_serves_its_own_adapter_only(engine: NativeEngine, folders: dict[str, Path]) -> None:
    prompt = "Once upon a time there was a llama that carried salt over the mountains. " * 8
    alone = {name: ask(engine, prompt, name) for name in (None, *folders)}
    for name in ("red", None, "blue", "red"):
        assert ask(engine, prompt, name) == alone[name]


def test_an_adapter_comes_and_goes_while_others_answer(
    engine: NativeEngine, folders: dict[str, Path], expected: dict[tuple[str, str | None], str]
) -> None:
    whole = engine.submit(Request(PROMPTS[2], LONG, adapter="red")).result(120).text
    running = engine.submit(Request(PROMPTS[2], LONG, adapter="red"))
    engine.load_adapter("late", folders["blue"])
    late = engine.submit(Request(PROMPTS[0], Sampling(10), adapter="late"))
    engine.unload_adapter("late")
    assert running.result(120).text == whole
    assert late.result(120).text == expected[PROMPTS[0], "blue"]
    with pytest.raises(AdapterError, match=r"'late'.*Known: blue, red"):
        ask(engine, PROMPTS[0], "late")


def test_a_scale_is_applied_and_a_name_can_be_given_to_other_weights(
    engine: NativeEngine, folders: dict[str, Path], expected: dict[tuple[str, str | None], str]
) -> None:
    engine.load_adapter("again", folders["red"])
    running = engine.submit(Request(PROMPTS[1], Sampling(10), adapter="again"))
    engine.load_adapter("again", folders["red"], 0.5)
    assert running.result(120).text == expected[PROMPTS[1], "red"]
    assert [ask(engine, prompt, "again") for prompt in PROMPTS] == [expected[prompt, "half"] for prompt in PROMPTS]
    engine.unload_adapter("again")


def test_after_a_crash_the_adapters_are_there_again(
    engine: NativeEngine, expected: dict[tuple[str, str | None], str]
) -> None:
    with engine.workers.using("red") as worker:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        settle(lambda: worker._child is None or worker._child.over)
    assert ask(engine, PROMPTS[0], "red") == expected[PROMPTS[0], "red"]


def test_processes_that_are_replaced_end(engine: NativeEngine, folders: dict[str, Path]) -> None:
    engine.load_adapter("short", folders["red"])
    with engine.workers.using("short") as worker:
        pid = worker.pid
    assert pid is not None
    engine.unload_adapter("short")
    engine.load_adapter("next", folders["red"])  # where one process runs all, it is replaced only now
    engine.unload_adapter("next")
    settle(lambda: not Path(f"/proc/{pid}").exists())


def test_what_cannot_run_beside_others_is_refused_and_the_rest_goes_on(
    engine: NativeEngine, smollm2: Path, tmp_path: Path, expected: dict[tuple[str, str | None], str]
) -> None:
    odd = make_adapter(smollm2, tmp_path / "odd", 5, use_dora=True)
    if engine.name == "llama_cpp":
        with pytest.raises(UnsupportedError, match="DoRA") as refused:
            engine.load_adapter("odd", odd)
        assert "models merge" in refused.value.hint
    (odd / "adapter_config.json").unlink()
    with pytest.raises(CalpacaError, match="adapter_config"):
        engine.load_adapter("odd", odd)
    with pytest.raises(AdapterError, match="Unknown adapter 'odd'"):
        engine.unload_adapter("odd")
    assert ask(engine, PROMPTS[0], None) == expected[PROMPTS[0], None]


def test_an_adapter_that_there_is_no_memory_for_is_refused(
    engine: NativeEngine, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from calpaca.core.engines import openvino

    if engine.name != "openvino":
        pytest.skip("llama_cpp reads its weights once for all adapters")
    monkeypatch.setattr(openvino, "free_memory", lambda: 1 << 20)
    with pytest.raises(ModelError, match=r"no room for adapter big: .* 1 MiB are free"):
        engine.load_adapter("big", folders["red"])
