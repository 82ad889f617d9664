"""GGUF files: what is in them is what the model is, and nothing is given out that is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from calpaca.core.checkpoint.manifest import read_manifest  # noqa: E402
from calpaca.core.checkpoint.verify import verify  # noqa: E402
from calpaca.core.errors import CalpacaError, CorruptFileError, ModelError, UnsupportedError, UsageError  # noqa: E402
from calpaca.core.export import gguf_export  # noqa: E402
from calpaca.core.export.gguf_export import GgufOptions, export_gguf, plan_gguf  # noqa: E402
from calpaca.core.export.gguf_types import K_QUANTS, PLAIN  # noqa: E402
from calpaca.core.export.hugging_face import plan_hugging_face  # noqa: E402
from calpaca.core.files import ModelFiles  # noqa: E402
from calpaca.core.gguf import hf_folder  # noqa: E402
from calpaca.core.gguf_model import Llama3Rope, find_llama3  # noqa: E402
from calpaca.core.gguf_tokenizer import tokenizer_files  # noqa: E402
from calpaca.core.golden import render_golden  # noqa: E402
from calpaca.core.jobs import Ledger  # noqa: E402
from calpaca.core.spec import ModelSpec  # noqa: E402
from calpaca.core.template import NAMED_TEMPLATES, NamedTemplate, choose_template, find_template  # noqa: E402
from calpaca.core.tokenizer import load_tokenizer  # noqa: E402

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 2010,
}  # fmt: skip
"""More rows than the small vocabulary has pieces."""

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
TEXTS = ["The llama 1234!", "羊驼，  你好\n", "<s>[INST] <|turn|> hi</s>", " 🦙 café ", ""]


@pytest.fixture(scope="session")
def plain_pieces(tmp_path_factory: pytest.TempPathFactory, small_pieces: Path) -> Path:
    """The small vocabulary without SentencePiece's own rewriting of texts and user-defined pieces; LLaMA has neither."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString((small_pieces / "tokenizer.model").read_bytes())
    normalizer = proto.normalizer_spec
    normalizer.name, normalizer.precompiled_charsmap, normalizer.remove_extra_whitespaces = "identity", b"", False
    next(piece for piece in proto.pieces if piece.piece == "<|turn|>").type = 3  # control
    folder = tmp_path_factory.mktemp("plain-pieces")
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


@pytest.fixture
def make(tmp_path: Path, plain_pieces: Path) -> Callable[..., Path]:
    """`make(folder, qwen=False, dtype=…, **config)` writes a model with random weights and the small vocabulary."""

    def write(folder: str, *, qwen: bool = False, dtype: str = "bfloat16", **changes: Any) -> Path:
        torch.manual_seed(5)
        kind, configuration = (Qwen2ForCausalLM, Qwen2Config) if qwen else (LlamaForCausalLM, LlamaConfig)
        model = kind(configuration(**{**SIZES, **changes})).to(getattr(torch, dtype))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / folder)
        shutil.copy(plain_pieces / "tokenizer.model", tmp_path / folder)
        return tmp_path / folder

    return write


def files_of(folder: Path, template: NamedTemplate | None = None) -> ModelFiles:
    return ModelFiles(folder.name, ModelSpec(model=str(folder)), folder, (), folder, template)


def exported(tmp_path: Path, folder: Path, kind: str = "f16", **options: Any) -> tuple[Path, Any]:
    output = tmp_path / f"{folder.name}-{kind}"
    template = options.pop("template", None)
    jobs = Ledger(tmp_path / "jobs.sqlite")
    _, check = export_gguf(files_of(folder, template), output, jobs, GgufOptions(kind, **options))
    return output / f"model-{kind}.gguf", check


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


# ---- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_every_plain_type_is_read_back_and_computes_the_same(tmp_path: Path, make, kind: str) -> None:
    file, check = exported(tmp_path, make("tiny"), kind)
    assert check.tensors == 21
    assert check.texts > 300
    assert check.relative < {"f32": 1e-5, "bf16": 1e-5, "f16": 1e-3, "q8_0": 0.05}.get(kind, 1.0)
    found = tensors(file)
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert found["blk.1.ffn_up.weight"].tensor_type.name == kind.upper()
    assert found["output.weight"].tensor_type.name == ("Q8_0" if kind[:2] in {"q4", "q5"} else kind.upper())
    assert fields(file)["general.file_type"] == gguf.LlamaFileType[PLAIN[kind].file_type]
    assert verify(file.parent).passed


def test_packed_rows_are_those_of_the_gguf_package(tmp_path: Path, make) -> None:
    """Block by block as they stream by, so the whole must be what the package makes of a whole matrix."""
    folder = make("tiny")
    file, _ = exported(tmp_path, folder, "q8_0")
    weight = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).model.layers[1].mlp.down_proj.weight
    expected = gguf.quants.quantize(weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert (tensors(file)["blk.1.ffn_down.weight"].data == expected).all()


def test_queries_and_keys_are_in_the_order_of_the_original_llama(tmp_path: Path, make) -> None:
    folder = make("tiny", dtype="float32")
    file, _ = exported(tmp_path, folder, "f32")
    attention = LlamaForCausalLM.from_pretrained(folder).model.layers[0].self_attn
    for name, weight, heads in (("attn_q", attention.q_proj.weight, 4), ("attn_k", attention.k_proj.weight, 2)):
        found = torch.from_numpy(np.array(tensors(file)[f"blk.0.{name}.weight"].data))
        halves = weight.detach().reshape(heads, 2, 8, 64)
        for pair in range(8):
            assert torch.equal(found.reshape(heads, 8, 2, 64)[:, pair, 0], halves[:, 0, pair])
            assert torch.equal(found.reshape(heads, 8, 2, 64)[:, pair, 1], halves[:, 1, pair])


def test_qwen2_keeps_the_order_of_rows_and_its_biases(tmp_path: Path, make) -> None:
    folder = make("qwen", qwen=True, dtype="float32")
    file, check = exported(tmp_path, folder, "f32")
    attention = Qwen2ForCausalLM.from_pretrained(folder).model.layers[0].self_attn
    found = tensors(file)
    assert (found["blk.0.attn_q.weight"].data == attention.q_proj.weight.detach().numpy()).all()
    assert (found["blk.0.attn_q.bias"].data == attention.q_proj.bias.detach().numpy()).all()
    assert check.relative < 1e-5
    assert fields(file)["general.architecture"] == "qwen2"


def test_biases_of_a_llama_are_reordered_with_their_rows(tmp_path: Path, make) -> None:
    file, check = exported(tmp_path, make("biased", attention_bias=True, mlp_bias=True), "f32")
    assert check.relative < 1e-5
    assert "blk.0.attn_q.bias" in tensors(file)


def test_a_mistral_is_written_as_a_llama_and_its_window_is_mentioned(tmp_path: Path, make, caplog) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    folder = make("mistral")
    torch.manual_seed(3)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=256)).to(torch.bfloat16)
    model.save_pretrained(folder)
    file, check = exported(tmp_path, folder)
    assert fields(file)["general.architecture"] == "llama"
    assert check.relative < 1e-3
    assert "looks back at most 256 tokens" in caplog.text


def test_tied_embeddings_are_written_once(tmp_path: Path, make) -> None:
    file, check = exported(tmp_path, make("tied", tie_word_embeddings=True), "q4_0")
    found = tensors(file)
    assert "output.weight" not in found
    assert found["token_embd.weight"].tensor_type.name == "Q8_0"
    assert check.tensors == 20


def test_heads_of_their_own_size_are_stated(tmp_path: Path, make) -> None:
    file, check = exported(tmp_path, make("wide", head_dim=32), "f16")
    told = fields(file)
    assert told["llama.attention.key_length"] == told["llama.attention.value_length"] == 32
    assert told["llama.rope.dimension_count"] == 32
    assert check.relative < 1e-3


def test_llama_3_scaling_becomes_factors_of_the_frequencies(tmp_path: Path, make, monkeypatch) -> None:
    """transformers computes the stretched frequencies; the file's factors must give the same ones."""
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    folder = make("llama3", rope_parameters=LLAMA3, dtype="float32", head_dim=64)
    file, check = exported(tmp_path, folder, "f32")
    factors = tensors(file)["rope_freqs.weight"].data
    plain = 1.0 / 500_000.0 ** (np.arange(0, 64, 2) / 64)
    stretched = LlamaForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq.numpy()
    assert np.allclose(plain / factors, stretched, rtol=1e-5)
    assert 1.0 == factors[0] < factors[-1] == 8.0
    assert check.relative < 1e-5
    config = json.loads((hf_folder(file) / "config.json").read_text())
    assert {key: config["rope_parameters"][key] for key in LLAMA3} == LLAMA3


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_published_stretchings_are_found_again(factor: float, head_dim: int) -> None:
    rope = Llama3Rope(factor, 1.0, 4.0, 8192)
    factors = rope.factors(500_000.0, head_dim // 2).astype(np.float32).astype(np.float64)
    assert find_llama3(factors, 500_000.0) == rope
    factors[3] *= 1.1
    assert find_llama3(factors, 500_000.0) is None


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_stretchings_are_keys(tmp_path: Path, make, kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 128} if kind == "yarn" else {}
    file, check = exported(tmp_path, make(kind, rope_parameters=rope), "f16")
    told = fields(file)
    assert (told["llama.rope.scaling.type"], told["llama.rope.scaling.factor"]) == (kind, 4.0)
    assert check.relative < 1e-3


def test_rows_that_do_not_divide_into_blocks_become_float16(tmp_path: Path, make, caplog) -> None:
    file, check = exported(tmp_path, make("odd", intermediate_size=100), "q8_0")
    found = tensors(file)
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"
    assert "2 tensors are stored as f16" in caplog.text
    assert check.relative < 0.1


def test_files_in_several_parts_are_read(tmp_path: Path, make) -> None:
    folder = make("tiny")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    shutil.copy(folder / "tokenizer.model", tmp_path / "parts")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    one, _ = exported(tmp_path, folder, "q8_0")
    several, _ = exported(tmp_path, tmp_path / "parts", "q8_0")
    manifests = [read_manifest(file.parent) for file in (one, several)]
    assert manifests[0].weights == manifests[1].weights


# ---- vocabulary ---------------------------------------------------------------------------------------------------


def test_a_sentencepiece_vocabulary_keeps_pieces_scores_and_types(tmp_path: Path, make) -> None:
    from sentencepiece import sentencepiece_model_pb2

    folder = make("tiny")
    file, _ = exported(tmp_path, folder)
    told = fields(file)
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    count = len(proto.pieces)
    assert told["tokenizer.ggml.tokens"][:count] == [piece.piece for piece in proto.pieces]
    assert told["tokenizer.ggml.token_type"][:count] == [piece.type for piece in proto.pieces]
    assert told["tokenizer.ggml.scores"][:count] == [piece.score for piece in proto.pieces]
    assert told["tokenizer.ggml.tokens"][count:] == [f"[PAD{index}]" for index in range(count, 2010)]
    assert set(told["tokenizer.ggml.token_type"][count:]) == {5}
    assert told["tokenizer.ggml.model"] == "llama"
    assert told["tokenizer.ggml.add_bos_token"]
    assert not told["tokenizer.ggml.add_eos_token"]
    assert told["tokenizer.ggml.add_space_prefix"]
    assert [told[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown")] == [1, 2, 0]


def test_tokens_beside_the_pieces_get_their_ids(tmp_path: Path, make) -> None:
    folder = make("added")
    described = {
        "2000": {"content": "<|user|>", "special": True},
        "2001": {"content": "two words", "special": False},
    }
    settings = {"added_tokens_decoder": described, "pad_token": "<|user|>", "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    file, _ = exported(tmp_path, folder)
    told = fields(file)
    assert told["tokenizer.ggml.tokens"][2000:2002] == ["<|user|>", "two words"]
    assert told["tokenizer.ggml.token_type"][2000:2002] == [3, 4]
    assert told["tokenizer.ggml.padding_token_id"] == 2000


def test_a_merged_chinese_vocabulary_keeps_its_ids(tmp_path: Path, make, merged: Path) -> None:
    folder = make("chinese", vocab_size=50_000)
    shutil.copy(merged / "tokenizer.model", folder)
    file, check = exported(tmp_path, folder, "f16", logits=False)
    assert check.texts > 300
    expected, found = load_tokenizer(folder), rebuilt(tmp_path, file)
    for text in [*TEXTS, "人工智能是计算机科学的一个分支，它企图了解智能的实质。1234567890"]:
        assert found.encode(text, special_tokens=True) == expected.encode(text, special_tokens=True)


def rebuilt(tmp_path: Path, file: Path) -> Any:
    folder = tmp_path / "rebuilt"
    folder.mkdir()
    for name, content in tokenizer_files(file).items():
        (folder / name).write_bytes(content)
    return load_tokenizer(folder)


def test_pieces_without_their_model_are_scored_by_merges(tmp_path: Path, make) -> None:
    """A folder may bring SentencePiece's vocabulary as tokenizer.json alone."""
    from calpaca.core.convert.tokenizer_files import hugging_face_tokenizer

    folder = make("json")
    for name, content in hugging_face_tokenizer(folder).items():
        (folder / name).write_bytes(content)
    expected = load_tokenizer(folder)
    (folder / "tokenizer.model").unlink()
    file, check = exported(tmp_path, folder)
    assert check.texts > 300
    found = rebuilt(tmp_path, file)
    assert [found.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
    assert fields(file)["tokenizer.ggml.model"] == "llama"


def bpe(folder: Path, cutting: Any, *, normalizer: Any = None, ignore_merges: bool = False) -> None:
    """Give a model a small byte-level BPE vocabulary, trained on this file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    (folder / "tokenizer.model").unlink(missing_ok=True)
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = cutting, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    tokenizer.add_special_tokens(
        [AddedToken("<|im_start|>", normalized=False), AddedToken("<|im_end|>", normalized=False)]
    )
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(NAMED_TEMPLATES["chatml"].source)


def cutting(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = {
        "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
    split["smaug-bpe"] = split["llama-bpe"]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in split)
    if name in split:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split[name]), behavior="isolated"), level])
    return (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if name == "smollm" else level
    )


@pytest.mark.parametrize("name", ["llama-bpe", "smaug-bpe", "qwen2", "smollm", "gpt-2"])
def test_the_way_texts_are_cut_is_recognised(tmp_path: Path, make, name: str) -> None:
    folder = make("bpe")
    bpe(folder, cutting(name), ignore_merges=name == "llama-bpe")
    file, check = exported(tmp_path, folder)
    told = fields(file)
    assert told["tokenizer.ggml.pre"] == name
    assert told["tokenizer.ggml.model"] == "gpt2"
    assert check.texts > 300
    tokens, types = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"]
    kinds = {text: types[tokens.index(text)] for text in ("<|im_start|>", "<tool_call>", "a")}
    assert kinds == {"<|im_start|>": 3, "<tool_call>": 4, "a": 1}
    assert not told["tokenizer.ggml.add_bos_token"]
    assert told["tokenizer.chat_template"] == NAMED_TEMPLATES["chatml"].source


def test_the_file_alone_renders_golden_conversations_to_the_same_ids(tmp_path: Path, make) -> None:
    """Its template and its vocabulary, without anything of the source."""
    folder = make("golden")
    bpe(folder, cutting("qwen2"))
    file, _ = exported(tmp_path, folder, logits=False)
    tokenizer, other = load_tokenizer(folder), rebuilt(tmp_path, file)
    expected = render_golden(choose_template(tokenizer), tokenizer)
    template = replace(choose_template(other), source=find_template(file))
    assert render_golden(template, other) == expected
    assert {each.error for each in expected} == {None}


def test_an_unknown_cutting_needs_a_name_and_a_wrong_one_is_found(tmp_path: Path, make, caplog) -> None:
    from tokenizers import Regex, pre_tokenizers

    folder = make("bpe")
    odd = pre_tokenizers.Split(Regex(r"\p{L}\p{L}|.|\n"), behavior="isolated")
    bpe(folder, pre_tokenizers.Sequence([odd, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))
    with pytest.raises(UnsupportedError, match="no name is known") as refused:
        exported(tmp_path, folder)
    assert "--pre" in refused.value.hint
    with pytest.raises(ModelError, match=r"llama\.cpp would give"):
        exported(tmp_path, folder, pre="qwen2")
    assert sorted(path.name for path in tmp_path.iterdir() if "bpe" in path.name) == ["bpe"]
    file, check = exported(tmp_path, folder, pre="deepseek-llm")
    assert fields(file)["tokenizer.ggml.pre"] == "deepseek-llm"
    assert check.texts is None
    assert "token ids were not compared" in caplog.text


def test_what_llama_cpp_does_not_do_to_a_text_is_said_or_refused(tmp_path: Path, make, caplog) -> None:
    from tokenizers import normalizers

    folder = make("bpe")
    bpe(folder, cutting("qwen2"), normalizer=normalizers.NFC())
    exported(tmp_path, folder, logits=False)
    assert "NFC" in caplog.text
    bpe(folder, cutting("qwen2"), normalizer=normalizers.Lowercase())
    with pytest.raises(UnsupportedError, match="Lowercase"):
        plan_gguf(files_of(folder))


def test_a_vocabulary_that_rewrites_texts_is_refused(tmp_path: Path, make, small_pieces: Path) -> None:
    """SentencePiece can join spaces and rewrite characters, which llama.cpp does not."""
    folder = make("spaces")
    shutil.copy(small_pieces / "tokenizer.model", folder)
    with pytest.raises(ModelError, match=r"llama\.cpp would give"):
        exported(tmp_path, folder)


def test_pieces_that_users_defined_are_refused_where_llama_cpp_begins_a_word_after_them(tmp_path: Path, make) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = make("defined") / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    next(piece for piece in proto.pieces if piece.piece == "<|turn|>").type = 4
    model.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"llama.cpp would give a text other token ids: .* for 'a<\|turn\|>b"):
        exported(tmp_path, model.parent)


def test_a_unigram_vocabulary_is_refused(make) -> None:
    data = Path(__file__).parents[2].parent / "shared" / "data" / "chinese_sp.model"
    if not data.is_file():
        pytest.skip("the shared test data (../shared/data) is not here")
    folder = make("unigram", vocab_size=20_000)
    shutil.copy(data, folder / "tokenizer.model")
    with pytest.raises(UnsupportedError, match="no BPE model"):
        plan_gguf(files_of(folder))


# ---- what is refused ----------------------------------------------------------------------------------------------


def changed(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["PhiForCausalLM"]}, "PhiForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
        ({"hidden_size": None}, "hidden_size|NoneType"),
    ],
)
def test_what_a_file_cannot_say_is_refused_by_name(make, changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(CalpacaError, match=message):
        plan_gguf(files_of(changed(make("odd"), **changes)))


def test_a_vocabulary_longer_than_the_embeddings_is_refused(make) -> None:
    with pytest.raises(ModelError, match="2000 tokens, but the model only 1990"):
        plan_gguf(files_of(make("short", vocab_size=1990)))


def test_unknown_types_and_those_of_llama_cpp_alone_are_refused(tmp_path: Path, make, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    files = files_of(make("tiny"))
    with pytest.raises(UnsupportedError, match="llama-quantize") as refused:
        plan_gguf(files, GgufOptions("q4_k_m"))
    assert "q8_0" in refused.value.hint
    with pytest.raises(UsageError, match="Unknown GGUF type 'q9_0'"):
        plan_gguf(files, GgufOptions("q9_0"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named(tmp_path: Path, make, value: float) -> None:
    folder = with_value(make("broken"), value)
    with pytest.raises(CorruptFileError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        exported(tmp_path, folder)
    assert not (tmp_path / "broken-f16").exists()


def test_numbers_beyond_float16_are_refused_with_what_holds_them(tmp_path: Path, make) -> None:
    folder = with_value(make("large"), 1e5)
    with pytest.raises(UnsupportedError, match="f16 cannot") as refused:
        exported(tmp_path, folder)
    assert "bf16" in refused.value.hint
    exported(tmp_path, folder, "bf16", logits=False)


def with_value(folder: Path, value: float) -> Path:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_taken_output_is_refused(tmp_path: Path, make) -> None:
    folder = make("tiny")
    exported(tmp_path, folder, logits=False)
    with pytest.raises(UsageError, match="exists already"):
        exported(tmp_path, folder, logits=False)


# ---- what goes wrong while writing --------------------------------------------------------------------------------


def test_a_file_that_differs_from_its_source_never_appears(tmp_path: Path, make, monkeypatch) -> None:
    """One flipped bit after writing; the next run begins anew."""
    folder = make("tiny")
    real = gguf_export.check_tensors

    def damaged(file: Path, planned: Any) -> int:
        data = bytearray(file.read_bytes())
        data[-2000] ^= 64
        file.write_bytes(data)
        return real(file, planned)

    monkeypatch.setattr(gguf_export, "check_tensors", damaged)
    with pytest.raises(ModelError, match=r"is not what was exported: blk\.1"):
        exported(tmp_path, folder)
    assert not any("tiny-f16" in path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(gguf_export, "check_tensors", real)
    file, _ = exported(tmp_path, folder)
    assert verify(file.parent).passed


def test_wrong_rows_are_found_by_what_the_model_computes(tmp_path: Path, make, monkeypatch) -> None:
    """As if the order of query rows had been forgotten: the numbers themselves would all be right."""
    from calpaca.core.export.gguf_architecture import GgufArchitecture

    monkeypatch.setattr(GgufArchitecture, "rotary_head_dim", lambda self, name: None)
    with pytest.raises(ModelError, match="its logits differ"):
        exported(tmp_path, make("tiny"))
    assert not (tmp_path / "tiny-f16").exists()


def test_a_full_disk_leaves_nothing_that_looks_finished(tmp_path: Path, make, monkeypatch) -> None:
    import errno

    from calpaca.core.checkpoint import stream

    folder = make("tiny")

    def full(self: Any, piece: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream.FileStream, "_write_all", full)
    with pytest.raises(CalpacaError, match="is full"):
        exported(tmp_path, folder)
    assert not (tmp_path / "tiny-f16").exists()
    monkeypatch.undo()


# ---- other forms --------------------------------------------------------------------------------------------------


def test_a_hugging_face_folder_is_whole_and_has_a_manifest(tmp_path: Path, make) -> None:
    from calpaca.core.checkpoint.write import write_model

    folder = make("tiny")
    write_model(plan_hugging_face(folder), tmp_path / "copy", Ledger(tmp_path / "jobs.sqlite"))
    assert verify(tmp_path / "copy").passed
    expected, found = load_tokenizer(folder), load_tokenizer(tmp_path / "copy")
    assert [found.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
    weights = [LlamaForCausalLM.from_pretrained(each).state_dict() for each in (folder, tmp_path / "copy")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_gguf_file_in_hugging_face_form_keeps_the_ids(tmp_path: Path, make, merged: Path, monkeypatch) -> None:
    """There and back: the tokenizer that transformers would make of the file gives other ids."""
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    folder = make("chinese", vocab_size=50_000)
    shutil.copy(merged / "tokenizer.model", folder)
    file, _ = exported(tmp_path, folder, logits=False)
    found, expected = load_tokenizer(hf_folder(file)), load_tokenizer(folder)
    for text in [*TEXTS, "人工智能是计算机科学的一个分支，它企图了解智能的实质。1234567890"]:
        assert found.encode(text, special_tokens=True) == expected.encode(text, special_tokens=True)


QUANTIZER = """#!{python}
import sys
source, target, kind = sys.argv[1:]
print("quantizing")
if kind == "Q2_K":
    sys.exit("something is wrong")
data = open(source, "rb").read()
open(target, "wb").write(data if kind == "Q4_K_M" else data[:-1000])
"""


def test_an_installed_quantizer_makes_the_types_that_only_it_has(tmp_path: Path, make, monkeypatch) -> None:
    """A program stands in for it here: what is tested is what is done with its result, or without one."""
    import sys

    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(QUANTIZER.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    folder = make("tiny")
    file, check = exported(tmp_path, folder, "q4_k_m")
    assert check.texts > 300
    assert verify(file.parent).passed
    assert read_manifest(file.parent).lineage.settings["type"] == "q4_k_m"
    for kind, message in (("q2_k", "exit code 1: something is wrong"), ("q6_k", "truncated")):
        with pytest.raises(CalpacaError, match=message):
            exported(tmp_path, folder, kind)
    assert {path.name for path in tmp_path.iterdir() if "tiny" in path.name} == {"tiny", "tiny-q4_k_m"}
    assert "q4_k_m" in K_QUANTS
