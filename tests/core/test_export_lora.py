"""Adapters as GGUF files: put on a GGUF base by hand, they compute what PEFT computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from calpaca.core.checkpoint.manifest import read_manifest  # noqa: E402
from calpaca.core.checkpoint.verify import verify  # noqa: E402
from calpaca.core.errors import AdapterError, CalpacaError, ModelError, UnsupportedError  # noqa: E402
from calpaca.core.export import lora  # noqa: E402
from calpaca.core.export.gguf_export import GgufOptions, export_gguf, plan_gguf  # noqa: E402
from calpaca.core.export.lora import export_lora, plan_lora  # noqa: E402
from calpaca.core.files import AdapterFiles, ModelFiles  # noqa: E402
from calpaca.core.jobs import Ledger  # noqa: E402
from calpaca.core.merge import merge, plan_merge  # noqa: E402
from calpaca.core.spec import ModelSpec  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about settings that are meant here

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 2000,
}  # fmt: skip
IDS = torch.tensor([[1, 5, 300, 77, 1999, 4, 5, 6]])


@pytest.fixture
def base(tmp_path: Path, small_pieces: Path) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
    shutil.copy(small_pieces / "tokenizer.model", tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapt(tmp_path: Path) -> Callable[..., Path]:
    """`adapt(base, **settings)` saves an adapter with random factors."""

    def make(base: Path, name: str = "lora", *, kind: Any = LlamaForCausalLM, **settings: Any) -> Path:
        torch.manual_seed(2)
        options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **settings}
        model = get_peft_model(kind.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def files_of(base: Path, *adapters: Path) -> ModelFiles:
    chosen = tuple(AdapterFiles(adapter.name, adapter) for adapter in adapters)
    return ModelFiles(base.name, ModelSpec(model=str(base)), base, chosen, base, None)


def exported(base: Path, adapter: Path, kind: str = "f32") -> Path:
    output = adapter.with_name(f"{adapter.name}-gguf-{kind}")
    export_lora(files_of(base, adapter), output, Ledger(base.parent / "jobs.sqlite"), base_name="a-base", kind=kind)
    return output / f"adapter-{kind}.gguf"


def with_factors(base: Path, adapter: Path, tmp_path: Path) -> Any:
    """The base as a GGUF file, its matrices changed as llama.cpp does it (W + B·A·alpha/r), back in transformers."""
    export = plan_gguf(files_of(base), GgufOptions("f32"))
    read = gguf.GGUFReader(adapter)
    factors = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in read.tensors}
    alpha = read.fields["adapter.lora.alpha"].contents()
    folder = tmp_path / "by-hand"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", export.architecture.name)
    from calpaca.core.export.gguf_header import describe_model, describe_vocabulary

    describe_model(writer, export.architecture, export.type, name="x", licence=None, parameters=1)
    describe_vocabulary(writer, export.vocabulary, None)
    for tensor in export.tensors:
        data = np.concatenate(list(tensor.rows()))
        if (a := factors.pop(f"{tensor.name}.lora_a", None)) is not None:
            b = factors.pop(f"{tensor.name}.lora_b")
            product = a @ b.T if tensor.name == "token_embd.weight" else b @ a
            data = data + product * np.float32(alpha / b.shape[1])
        writer.add_tensor(tensor.name, data.reshape(tensor.source.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert not factors
    kind = Qwen2ForCausalLM if export.architecture.name == "qwen2" else LlamaForCausalLM
    return kind.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(IDS).logits


SETTINGS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"k_proj": 3}},
    "rank-stabilised patterns": {"use_rslora": True, "rank_pattern": {"o_proj": 16}},
    "embeddings and output": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "some layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_llama_cpps_arithmetic_gives_pefts_logits(base: Path, adapt, tmp_path: Path, name: str) -> None:
    adapter = adapt(base, **SETTINGS[name])
    file = exported(base, adapter)
    expected = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter))
    plain = logits(LlamaForCausalLM.from_pretrained(base))
    found = logits(with_factors(base, file, tmp_path))
    assert torch.allclose(found, expected, atol=1e-5)
    assert (plain - expected).abs().max() > 0.01
    assert verify(file.parent).passed


def test_qwen2s_factors_keep_their_order(tmp_path: Path, adapt, small_pieces: Path) -> None:
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(tmp_path / "qwen")
    shutil.copy(small_pieces / "tokenizer.model", tmp_path / "qwen")
    adapter = adapt(tmp_path / "qwen", kind=Qwen2ForCausalLM)
    file = exported(tmp_path / "qwen", adapter)
    expected = logits(PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(tmp_path / "qwen"), adapter))
    assert torch.allclose(logits(with_factors(tmp_path / "qwen", file, tmp_path)), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_factors_may_be_rounded(base: Path, adapt, kind: str) -> None:
    found = gguf.GGUFReader(exported(base, adapt(base), kind)).tensors
    assert {tensor.tensor_type.name for tensor in found} == {kind.upper()}


def test_the_file_says_what_it_is(base: Path, adapt) -> None:
    file = exported(base, adapt(base))
    told = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    assert told["general.type"] == "adapter"
    assert told["general.architecture"] == "llama"
    assert told["adapter.type"] == "lora"
    assert told["adapter.lora.alpha"] == 6.0
    lines = (file.parent / "Modelfile").read_text().splitlines()
    assert lines[::2][:2] == ["FROM a-base", "ADAPTER ./adapter-f32.gguf"]
    lineage = read_manifest(file.parent).lineage
    assert [each.role for each in lineage.inputs] == ["base", "adapter"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"whole modules \(lm_head\)"),
        ({"trainable_token_indices": [3, 4]}, "single tokens"),
    ],
)
def test_what_such_a_file_cannot_carry_is_refused_and_can_be_merged(
    base: Path, adapt, settings: dict[str, Any], message: str
) -> None:
    adapter = adapt(base, **settings)
    with pytest.raises(UnsupportedError, match=message) as refused:
        plan_lora(files_of(base, adapter), "a-base")
    assert f"--adapter {adapter}" in refused.value.hint


def test_an_adapter_of_another_base_is_refused(base: Path, adapt, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 128})).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="another base"):
        plan_lora(files_of(tmp_path / "other", adapt(base)), "other")


def test_unknown_types_are_refused(base: Path, adapt) -> None:
    with pytest.raises(UnsupportedError, match="q8_0"):
        plan_lora(files_of(base, adapt(base)), "a-base", "q8_0")


def test_a_file_that_differs_never_appears(base: Path, adapt, tmp_path: Path, monkeypatch) -> None:
    adapter = adapt(base)
    packed = lora._Factor._packed
    monkeypatch.setattr(lora._Factor, "_packed", lambda self: (bytes(reversed(data)) for data in packed(self)))
    with pytest.raises(ModelError, match="is not what was exported"):
        exported(base, adapter)
    assert not any("gguf" in path.name for path in tmp_path.iterdir())


def test_adapters_are_merged_on_the_way_bit_for_bit(base: Path, adapt, tmp_path: Path, small_pieces: Path) -> None:
    """The same bytes as an export of the merged folder, but for the name; no merged folder is written."""
    one, two = adapt(base, "one"), adapt(base, "two", r=2, use_dora=True)
    pieces = base / "tokenizer.model"
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(pieces.read_bytes())
    normalizer = proto.normalizer_spec
    normalizer.precompiled_charsmap, normalizer.remove_extra_whitespaces = b"", False
    next(piece for piece in proto.pieces if piece.piece == "<|turn|>").type = 3
    pieces.write_bytes(proto.SerializeToString())
    jobs = Ledger(tmp_path / "jobs.sqlite")
    merge(plan_merge(files_of(base, one, two), tmp_path / "merged"), jobs)
    options = GgufOptions("q8_0")
    direct, check = export_gguf(files_of(base, one, two), tmp_path / "direct", jobs, options)
    by_way, _ = export_gguf(files_of(tmp_path / "merged"), tmp_path / "by-way", jobs, options)
    assert direct.weights == by_way.weights
    assert check.relative < 0.1
    assert [each.role for each in direct.lineage.inputs] == ["base", "adapter", "adapter"]


def test_a_problem_of_the_merge_stops_the_export(base: Path, adapt, tmp_path: Path) -> None:
    adapter = adapt(base)
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CalpacaError):
        plan_gguf(files_of(base, adapter))
