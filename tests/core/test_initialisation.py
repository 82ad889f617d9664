"""Adapters that changed their base when training began: refused wherever they would run, and made ordinary as told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

from calpaca.core.engine import Request, Sampling  # noqa: E402
from calpaca.core.engines.transformers import TransformersEngine  # noqa: E402
from calpaca.core.errors import UnsupportedError  # noqa: E402
from calpaca.core.export.lora import export_lora  # noqa: E402
from calpaca.core.files import AdapterFiles, ModelFiles  # noqa: E402
from calpaca.core.initialisation import check_initialisation  # noqa: E402
from calpaca.core.jobs import Ledger  # noqa: E402
from calpaca.core.spec import ModelSpec  # noqa: E402
from calpaca.core.weights import load_weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, about adapters that change the base

IDS = [1, 5, 300, 77, 1999, 4]
CHANGING = ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq"]
CONVERSION, OWN_BASE = "path_initial_model_for_weight_conversion=START", r"unload\(\).save_pretrained\(BASE\)"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, small_pieces: Path) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(
        LlamaConfig(vocab_size=2000, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((small_pieces / "tokenizer.model").read_bytes())
    return folder


@dataclass(frozen=True)
class Trained:
    """An adapter as PEFT has it after training, and as it was `start`ed."""

    model: Any
    start: Path

    def top(self) -> Any:
        """The five highest log probabilities after `IDS`, to compare with."""
        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([IDS])).logits[0, -1]
        return pytest.approx(torch.log_softmax(logits, dim=-1).topk(5).values.tolist(), abs=1e-4)


def prepare(kind: str, model: Any, config: LoraConfig) -> None:
    """What PEFT needs to see before it makes an adapter: activations (CorDA) or gradients (LoRA-GA)."""
    ids = torch.tensor([IDS])
    if kind == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config.corda_config = CordaConfig(corda_method="kpm")
        preprocess_corda(model, config, run_model=lambda: [model((ids + number) % 2000) for number in range(30)])
    elif kind == "lora_ga":
        from peft import LoraGAConfig, preprocess_loraga

        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(model, config, model(ids, labels=ids).loss.backward)


@pytest.fixture
def train(base: Path, tmp_path: Path) -> Callable[..., Trained]:
    def make(kind: str, **options: Any) -> Trained:
        if kind == "loftq":
            pytest.importorskip("bitsandbytes", reason="PEFT makes LoftQ adapters with bitsandbytes, which is not here")
            if not torch.cuda.is_available():
                pytest.skip("PEFT makes LoftQ adapters on CUDA alone")
            options["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1}
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=kind, **options
        )  # fmt: skip
        unchanged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        prepare(kind, unchanged, config)
        model = get_peft_model(unchanged, config)
        model.save_pretrained(tmp_path / "start")
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.add_(torch.linspace(-0.5, 0.5, weight.numel()).view_as(weight))
        return Trained(model.eval(), tmp_path / "start")

    return make


def files_of(base: Path, *adapters: Path) -> ModelFiles:
    chosen = tuple(AdapterFiles(adapter.name, adapter) for adapter in adapters)
    return ModelFiles("base", ModelSpec(model=str(base), device="cpu", dtype="float32"), base, chosen, base, None)


@pytest.fixture
def engines() -> Iterator[Callable[..., TransformersEngine]]:
    opened = []

    def open_engine(base: Path, *adapters: Path) -> TransformersEngine:
        opened.append(TransformersEngine(load_weights(files_of(base, *adapters))))
        return opened[-1]

    yield open_engine
    for engine in opened:
        engine.close()


def top(engine: TransformersEngine, adapter: str | None = None) -> list[float]:
    answer = engine.submit(Request(tuple(IDS), Sampling(1, logprobs=5), adapter=adapter)).result(60)
    return [value for *_, value in answer.logprobs[0].top]


@pytest.mark.parametrize("kind", ["pissa", "olora", "corda", "lora_ga", "loftq"])
def test_as_it_was_trained_it_is_refused_live_at_load_and_by_export(
    base: Path, tmp_path: Path, train: Callable[..., Trained], engines, kind: str
) -> None:
    train(kind).model.save_pretrained(tmp_path / "trained")
    way = OWN_BASE if kind == "loftq" else CONVERSION
    message = rf"Adapter \w+ was initialised by {kind}, which changes the base's weights too\..*{way}"
    with pytest.raises(UnsupportedError, match=message):
        engines(base).load_adapter("trained", tmp_path / "trained")
    with pytest.raises(UnsupportedError, match=message):
        load_weights(files_of(base, tmp_path / "trained"))
    with pytest.raises(UnsupportedError, match=message):
        export_lora(
            files_of(base, tmp_path / "trained"), tmp_path / "gguf", Ledger(tmp_path / "jobs"), base_name="base"
        )


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_converted_as_the_hint_says_it_computes_live_and_at_load_what_was_trained(
    base: Path, tmp_path: Path, train: Callable[..., Trained], engines, kind: str
) -> None:
    trained = train(kind)
    expected = trained.top()
    trained.model.save_pretrained(
        tmp_path / "ordinary", path_initial_model_for_weight_conversion=str(trained.start)
    )  # fmt: skip
    live = engines(base)
    live.load_adapter("ordinary", tmp_path / "ordinary")
    assert top(live, "ordinary") == expected != top(live)
    assert top(engines(base, tmp_path / "ordinary")) == expected


@pytest.mark.parametrize(
    ("kind", "options"), [("pissa", {"use_rslora": True, "rank_pattern": {"up_proj": 2}}), ("loftq", {})]
)
def test_what_peft_cannot_convert_computes_what_was_trained_on_the_base_that_the_hint_has_saved(
    base: Path, tmp_path: Path, train: Callable[..., Trained], engines, kind: str, options: dict[str, Any]
) -> None:
    trained = train(kind, **options)
    expected = trained.top()
    trained.model.save_pretrained(tmp_path / "trained")
    with pytest.raises(UnsupportedError, match=f"cannot convert it.*{OWN_BASE}"):
        load_weights(files_of(base, tmp_path / "trained"))
    trained.model.unload().save_pretrained(tmp_path / "changed")
    (tmp_path / "changed" / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    config = tmp_path / "trained" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": True}))
    live = engines(tmp_path / "changed")
    live.load_adapter("trained", tmp_path / "trained")
    assert top(live, "trained") == expected == top(engines(tmp_path / "changed", tmp_path / "trained"))


@pytest.mark.parametrize("kind", CHANGING)
def test_every_kind_that_changes_the_base_is_refused_with_a_way_that_exists_for_it(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=OWN_BASE if kind == "loftq" else CONVERSION):
        check_initialisation("llama", {"init_lora_weights": kind})


@pytest.mark.parametrize("kind", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_kinds_that_leave_the_base_as_it_is_are_taken(kind: object) -> None:
    check_initialisation("llama", {"init_lora_weights": kind})
    check_initialisation("llama", {})


def test_an_unknown_kind_is_refused_as_such() -> None:
    with pytest.raises(UnsupportedError, match="by next_year, which is not known to leave the base's"):
        check_initialisation("llama", {"init_lora_weights": "next_year"})
