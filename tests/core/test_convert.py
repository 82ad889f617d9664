"""Original `.pth` checkpoints and Hugging Face folders: the same numbers in both, and the same answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calpaca.core.checkpoint.manifest import read_manifest
from calpaca.core.checkpoint.plan import copied
from calpaca.core.checkpoint.reader import open_checkpoint
from calpaca.core.checkpoint.verify import verify
from calpaca.core.checkpoint.write import write_model
from calpaca.core.convert.conversion import Target, plan_conversion
from calpaca.core.convert.parts import open_original, pth_files, pth_params
from calpaca.core.convert.source import identify
from calpaca.core.errors import (
    CalpacaError,
    CorruptFileError,
    ModelError,
    ModelNotFoundError,
    UnsupportedError,
    UsageError,
)
from calpaca.core.jobs import Ledger
from calpaca.core.runtime import Runtime
from calpaca.core.settings import Settings
from calpaca.core.sources import resolve_model

Convert = Callable[..., Path]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """`convert(source, "name", form="pth", parts=2)` writes a folder and returns it."""
    jobs = Ledger(tmp_path / "jobs.sqlite")

    def run(source: Path, name: str, **target: Any) -> Path:
        conversion = plan_conversion(source, Target(**target))
        assert conversion.plan is not None
        write_model(conversion.plan, tmp_path / name, jobs)
        return tmp_path / name

    return run


# ---- an independent view of original checkpoints: Meta's formulas, written out here --------------------------------


@dataclass(frozen=True)
class Params:
    """What a params.json of these tests may hold."""

    dim: int = 64
    n_layers: int = 2
    n_heads: int = 8
    n_kv_heads: int = 8
    vocab_size: int = 101
    intermediate: int = 176
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    use_scaled_rope: bool = False

    @property
    def rows_divided(self) -> bool:
        """Llama 3 divides the embeddings by rows, LLaMA and Llama 2 by columns."""
        return self.rope_theta == 500_000.0


MHA = Params()
GQA = Params(n_kv_heads=2, vocab_size=103)
LLAMA3 = Params(n_kv_heads=8, rope_theta=500_000.0, use_scaled_rope=True, vocab_size=104)
EIGHT_BY_SIXTEEN = Params(n_heads=16, n_kv_heads=8, dim=128, intermediate=256, vocab_size=1003)  # not divisible by 8

MP16 = Params(n_heads=32, n_kv_heads=8, dim=256, rope_theta=500_000.0, use_scaled_rope=True, vocab_size=112)

AXES = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}


def random_weights(params: Params, dtype: torch.dtype) -> dict[str, Tensor]:
    """A whole original checkpoint of random numbers."""
    generator = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    def norm() -> Tensor:
        return (1 + torch.randn(params.dim, generator=generator) / 10).to(dtype)

    narrow = params.dim // params.n_heads * params.n_kv_heads
    weights = {
        "tok_embeddings.weight": matrix(params.vocab_size, params.dim) * 8,
        "norm.weight": norm(),
        "output.weight": matrix(params.vocab_size, params.dim),
    }
    for layer in range(params.n_layers):
        weights |= {
            f"layers.{layer}.attention.wq.weight": matrix(params.dim, params.dim),
            f"layers.{layer}.attention.wk.weight": matrix(narrow, params.dim),
            f"layers.{layer}.attention.wv.weight": matrix(narrow, params.dim),
            f"layers.{layer}.attention.wo.weight": matrix(params.dim, params.dim),
            f"layers.{layer}.feed_forward.w1.weight": matrix(params.intermediate, params.dim),
            f"layers.{layer}.feed_forward.w2.weight": matrix(params.dim, params.intermediate),
            f"layers.{layer}.feed_forward.w3.weight": matrix(params.intermediate, params.dim),
            f"layers.{layer}.attention_norm.weight": norm(),
            f"layers.{layer}.ffn_norm.weight": norm(),
        }
    return weights


def axis_of(name: str, params: Params) -> int | None:
    if "norm" in name:
        return None
    if name == "tok_embeddings.weight":
        return 0 if params.rows_divided else 1
    return AXES.get(name.split(".")[-2], 0)


def save_parts(folder: Path, weights: dict[str, Tensor], params: Params, parts: int) -> Path:
    """Write an original checkpoint with torch alone."""
    folder.mkdir(parents=True)
    for number in range(parts):
        part = {"rope.freqs": torch.zeros(4)} if not params.rows_divided else {}
        for name, whole in weights.items():
            axis = axis_of(name, params)
            if axis is None:
                part[name] = whole.clone()
                continue
            if name.split(".")[-2] in {"wk", "wv"} and parts > params.n_kv_heads:
                heads = whole.chunk(params.n_kv_heads)  # Meta's replication: neighbouring parts hold one head
                part[name] = heads[number * params.n_kv_heads // parts].clone()
                continue
            share = whole.shape[axis] // parts
            sizes = [share] * (parts - 1) + [whole.shape[axis] - share * (parts - 1)]
            part[name] = whole.split(sizes, dim=axis)[number].clone()
        torch.save(part, folder / f"consolidated.{number:02}.pth")
    content = {"dim": params.dim, "n_layers": params.n_layers, "n_heads": params.n_heads, "norm_eps": params.norm_eps,
               "multiple_of": 16, "vocab_size": -1}  # fmt: skip
    if params.n_kv_heads != params.n_heads:
        content["n_kv_heads"] = params.n_kv_heads
    if params.rope_theta != 10_000.0:
        content["rope_theta"] = params.rope_theta
    if params.use_scaled_rope:
        content |= {"use_scaled_rope": True, "rope_scaling_factor": 8}
    (folder / "params.json").write_text(json.dumps(content))
    return folder


def load_parts(folder: Path, params: Params) -> dict[str, Tensor]:
    """Whole tensors of an original checkpoint, joined with torch alone."""
    parts = [torch.load(file, weights_only=True) for file in sorted(folder.glob("consolidated.*.pth"))]
    whole = {}
    for name in parts[0]:
        axis = axis_of(name, params)
        whole[name] = parts[0][name] if axis is None else torch.cat([part[name] for part in parts], dim=axis)
    return whole


def scaled(frequencies: Tensor, factor: float) -> Tensor:
    """Llama 3.1's stretching of the rotary frequencies, as Meta's code has it."""
    result = []
    for frequency in frequencies:
        wavelength = 2 * torch.pi / frequency
        if wavelength < 8192 / 4:
            result.append(frequency)
        elif wavelength > 8192 / 1:
            result.append(frequency / factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            result.append((1 - smooth) * frequency / factor + smooth * frequency)
    return torch.stack(result)


def rotate(heads: Tensor, turns: Tensor) -> Tensor:
    """Neighbouring pairs of numbers as complex ones, turned: heads is [length, heads, head_dim]."""
    pairs = torch.view_as_complex(heads.reshape(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def reference_logits(weights: dict[str, Tensor], params: Params, token_ids: list[int], factor: float = 8.0) -> Tensor:
    """Logits [length, vocabulary] in float32, straight from an original checkpoint's tensors."""
    weights = {name: tensor.float() for name, tensor in weights.items()}
    head_dim, length = params.dim // params.n_heads, len(token_ids)
    frequencies = 1.0 / params.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if params.use_scaled_rope:
        frequencies = scaled(frequencies, factor)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)
    mask = torch.full((length, length), float("-inf")).triu(1)

    def norm(hidden: Tensor, name: str) -> Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + params.norm_eps) * weights[f"{name}.weight"]

    hidden = weights["tok_embeddings.weight"][token_ids]
    for layer in range(params.n_layers):
        at = f"layers.{layer}."
        normed = norm(hidden, f"{at}attention_norm")
        queries, keys, values = (
            (normed @ weights[f"{at}attention.{name}.weight"].T).view(length, -1, head_dim)
            for name in ("wq", "wk", "wv")
        )
        queries, keys = rotate(queries, turns), rotate(keys, turns)
        group = params.n_heads // params.n_kv_heads
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / head_dim**0.5 + mask
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).reshape(length, -1)
        hidden = hidden + attended @ weights[f"{at}attention.wo.weight"].T
        normed = norm(hidden, f"{at}ffn_norm")
        gate = torch.nn.functional.silu(normed @ weights[f"{at}feed_forward.w1.weight"].T)
        hidden = (
            hidden
            + (gate * (normed @ weights[f"{at}feed_forward.w3.weight"].T)) @ weights[f"{at}feed_forward.w2.weight"].T
        )
    return norm(hidden, "norm") @ weights["output.weight"].T


def hf_logits(folder: Path, token_ids: list[int]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    buffers = {"rope.freqs"}
    return set(a) - buffers == set(b) - buffers and all(
        a[name].dtype == b[name].dtype and a[name].view(torch.int16).equal(b[name].view(torch.int16))
        for name in set(a) - buffers
    )


# ---- exactness ----------------------------------------------------------------------------------------------------

SHAPES = [
    pytest.param(MHA, 1, id="mha-1"),
    pytest.param(MHA, 2, id="mha-2"),
    pytest.param(MHA, 8, id="mha-8"),
    pytest.param(GQA, 1, id="gqa-1"),
    pytest.param(GQA, 2, id="gqa-2"),
    pytest.param(EIGHT_BY_SIXTEEN, 8, id="gqa-8"),
    pytest.param(LLAMA3, 1, id="llama3-1"),
    pytest.param(LLAMA3, 2, id="llama3-2"),
    pytest.param(LLAMA3, 8, id="llama3-8"),
    pytest.param(MP16, 16, id="llama3-405b-16"),
    pytest.param(GQA, 8, id="gqa-8-of-2"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("params", "parts"), SHAPES)
def test_pth_to_hugging_face_and_back_keeps_every_byte(
    convert: Convert, tmp_path: Path, params: Params, parts: int, dtype: torch.dtype
) -> None:
    original = save_parts(tmp_path / "original", random_weights(params, dtype), params, parts)
    folder = convert(original, "hf", context_length=512)
    back = convert(folder, "back", form="pth", parts=parts)
    for file in sorted(original.glob("*.pth")):
        assert same_bytes(torch.load(file, weights_only=True), torch.load(back / file.name, weights_only=True))
    assert len(list(back.glob("*.pth"))) == parts
    again = convert(back, "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    for written in (folder, back, again):
        assert verify(written).passed


@pytest.mark.parametrize(("params", "parts"), SHAPES)
def test_a_converted_model_computes_what_the_original_does(
    convert: Convert, tmp_path: Path, params: Params, parts: int
) -> None:
    weights = random_weights(params, torch.float32)
    original = save_parts(tmp_path / "original", weights, params, parts)
    token_ids = [(7 * number * number + 3) % params.vocab_size for number in range(40)]
    expected = reference_logits(weights, params, token_ids)
    found = hf_logits(convert(original, "hf"), token_ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_llama_3_scaling_is_read_and_matters(tmp_path: Path) -> None:
    params = LLAMA3
    weights = random_weights(params, torch.float32)
    token_ids = [(5 * number) % params.vocab_size for number in range(40)]
    plain = reference_logits(weights, params, token_ids, factor=1.0)
    assert (plain - reference_logits(weights, params, token_ids)).abs().max() > 1e-3


@pytest.mark.parametrize("parts", [1, 3])
def test_real_weights_go_there_and_back(convert: Convert, smollm2: Path, parts: int) -> None:
    """SmolLM2 has 9 heads, 3 key-value heads and one matrix for both embeddings and output."""
    original = convert(smollm2, "original", form="pth", parts=parts)
    folder = convert(original, "hf")
    before, after = open_checkpoint(smollm2), open_checkpoint(folder)
    for name in before.tensors:
        assert b"".join(before.chunks(name)) == b"".join(after.chunks(name)), name
    assert set(after.tensors) - set(before.tensors) == {"lm_head.weight"}
    assert b"".join(after.chunks("lm_head.weight")) == b"".join(before.chunks("model.embed_tokens.weight"))
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192  # kept in the manifest, since params.json cannot say it
    assert (folder / "tokenizer.json").read_bytes() == (smollm2 / "tokenizer.json").read_bytes()


def test_real_weights_compute_the_same_in_either_form(convert: Convert, smollm2: Path) -> None:
    original = convert(smollm2, "original", form="pth", parts=3)
    params = Params(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, rope_theta=100_000.0)
    told = json.loads((original / "params.json").read_text())
    assert (told["dim"], told["n_heads"], told["n_kv_heads"], told["rope_theta"]) == (576, 9, 3, 100_000.0)
    token_ids = [1, 4093, 198, 2683, 359, 253, 5356, 42]
    expected = reference_logits(load_parts(original, params), params, token_ids)
    torch.testing.assert_close(hf_logits(smollm2, token_ids), expected, atol=2e-3, rtol=1e-3)


def test_parts_are_shared_out_anew(convert: Convert, tmp_path: Path) -> None:
    weights = random_weights(MHA, torch.float16)
    two = save_parts(tmp_path / "two", weights, MHA, 2)
    assert same_bytes(load_parts(convert(two, "four", parts=4), MHA), weights)


def test_an_output_layer_that_parts_do_not_divide_leaves_the_rest_to_the_last(convert: Convert, tmp_path: Path) -> None:
    params = Params(vocab_size=49953, n_layers=1)
    original = save_parts(tmp_path / "one", random_weights(params, torch.float16), params, 1)
    two = convert(convert(original, "hf"), "two", form="pth", parts=2)
    rows = [open_checkpoint(file).tensors["output.weight"].shape[0] for file in sorted(two.glob("*.pth"))]
    assert rows == [24976, 24977]


def test_a_bin_folder_becomes_safetensors(convert: Convert, tmp_path: Path) -> None:
    original = save_parts(tmp_path / "one", random_weights(GQA, torch.float16), GQA, 1)
    folder = convert(original, "hf")
    as_bin = convert(folder, "bin", container="torch", shard_size=60_000)
    assert len(list(as_bin.glob("pytorch_model-*.bin"))) > 1
    assert (as_bin / "pytorch_model.bin.index.json").is_file()
    back = convert(as_bin, "back")
    assert read_manifest(back).weights == read_manifest(folder).weights == read_manifest(as_bin).weights
    assert read_manifest(back).lineage.every()[-1].name == "one"


def test_rotary_frequencies_of_old_files_are_left_out(convert: Convert, tmp_path: Path) -> None:
    folder = convert(save_parts(tmp_path / "one", random_weights(MHA, torch.float16), MHA, 1), "hf")
    old = tmp_path / "old"
    old.mkdir()
    checkpoint = open_checkpoint(folder)
    state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    torch.save(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, old / "pytorch_model.bin")
    shutil.copy(folder / "config.json", old)
    assert read_manifest(convert(old, "new")).weights == read_manifest(folder).weights
    assert read_manifest(convert(old, "pth", form="pth")).files.keys() == {"consolidated.00.pth", "params.json"}


def test_another_dtype_rounds_once_and_refuses_what_does_not_fit(convert: Convert, tmp_path: Path) -> None:
    weights = random_weights(MHA, torch.float32)
    folder = convert(save_parts(tmp_path / "one", weights, MHA, 1), "bf16", dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    norm = open_checkpoint(folder).read("model.norm.weight")
    assert norm.equal(weights["norm.weight"].bfloat16())
    weights["norm.weight"][3] = 1e6
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds 1e\+06, which float16 cannot"):
        convert(save_parts(tmp_path / "large", weights, MHA, 1), "fp16", dtype="float16")


def test_only_the_rows_that_a_part_needs_are_read_of_a_copy(tmp_path: Path) -> None:
    """A matrix that parts divide by rows is read once in all, however many parts there are."""
    from safetensors.torch import save_file

    save_file({"matrix": torch.arange(64, dtype=torch.float16).reshape(8, 8)}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    from calpaca.core.convert.rows import rows

    found = b"".join(rows(copied(checkpoint, "matrix"), 2, 4))
    assert torch.frombuffer(bytearray(found), dtype=torch.float16).tolist() == list(range(16, 32))


def test_the_memory_of_a_conversion_is_a_few_pieces(tmp_path: Path) -> None:
    """The largest piece that streams by, of a matrix of 64 MB divided by columns and one that is permuted."""
    params = Params(dim=4096, n_heads=32, n_kv_heads=32, n_layers=1, intermediate=4096, vocab_size=128)
    original = open_original(save_parts(tmp_path / "big", random_weights(params, torch.float16), params, 2))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        tensor = next(each for each in original.tensors if each.name == name)
        sizes = [len(piece) for piece in tensor.chunks()]
        assert sum(sizes) == tensor.size == 32 << 20
        assert max(sizes) <= 8 << 20


@pytest.mark.parametrize(
    ("hidden", "intermediate", "stated"),
    [
        (4096, 11008, {"multiple_of": 256}),  # LLaMA and Llama 2 7B
        (5120, 13824, {"multiple_of": 256}),  # 13B
        (6656, 17920, {"multiple_of": 256}),  # 33B
        (8192, 22016, {"multiple_of": 256}),  # 65B
        (8192, 28672, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),  # Llama 2 and 3 70B
        (4096, 14336, {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}),  # Llama 3 8B
        (2048, 8192, {"multiple_of": 256, "ffn_dim_multiplier": 1.5}),  # Llama 3.2 1B
    ],
)
def test_published_models_get_their_published_params(hidden: int, intermediate: int, stated: dict[str, Any]) -> None:
    from calpaca.core.convert.architecture import Architecture, to_params

    params = to_params(Architecture(hidden, intermediate, 2, hidden // 128, hidden // 128, 32000, 1e-5))
    assert {key: params[key] for key in ("multiple_of", "ffn_dim_multiplier") if key in params} == stated


@pytest.mark.parametrize(("hidden", "intermediate"), [(576, 1536), (64, 177), (100, 401), (2048, 5632)])
def test_any_width_of_the_feed_forward_layers_can_be_written(hidden: int, intermediate: int) -> None:
    from calpaca.core.convert.architecture import Architecture, to_params

    params = to_params(Architecture(hidden, intermediate, 1, 2, 2, 10, 1e-5))
    size = int(2 * 4 * hidden / 3)
    if "ffn_dim_multiplier" in params:
        size = int(params["ffn_dim_multiplier"] * size)
    multiple = params["multiple_of"]
    assert multiple * ((size + multiple - 1) // multiple) == intermediate


# ---- what cannot be done is said ----------------------------------------------------------------------------------


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """An original checkpoint in two parts."""
    return save_parts(tmp_path / "13B", random_weights(MHA, torch.float16), MHA, 2)


@pytest.fixture
def folder(original: Path, convert: Convert) -> Path:
    """The same model at Hugging Face."""
    return convert(original, "folder")


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(file, weights_only=True) if file.suffix == ".pth" else json.loads(file.read_text())
    change(content)
    if file.suffix == ".pth":
        torch.save(content, file)
    else:
        file.write_text(json.dumps(content))


def refusal(path: Path, kind: type[CalpacaError] = CalpacaError, **target: Any) -> str:
    with pytest.raises(kind) as caught:
        plan_conversion(path, Target(**target))
    return str(caught.value)


def test_an_original_checkpoint_verifies_against_the_manifest_of_its_hugging_face_form(
    original: Path, folder: Path, tmp_path: Path
) -> None:
    assert verify(original, folder).passed
    edit(original / "consolidated.01.pth", lambda part: part["layers.1.attention.wk.weight"][0].mul_(2))
    (finding,) = verify(original, folder).findings
    assert finding.tensors == ("model.layers.1.self_attn.k_proj.weight",)
    assert finding.problem == "has other values"


def test_a_checkpoint_of_tied_embeddings_verifies_too(convert: Convert, smollm2: Path) -> None:
    original = convert(smollm2, "original", form="pth")
    tied = convert(smollm2, "tied", shard_size=10**9)
    assert "lm_head.weight" not in read_manifest(tied).tensors
    assert verify(original, tied).passed


def test_reading_an_original_checkpoint_as_a_hugging_face_folder_names_the_command_that_helps(original: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"calpaca models convert .* --output DIR"):
        open_checkpoint(original)


def test_a_missing_last_part_is_counted(original: Path) -> None:
    (original / "consolidated.01.pth").unlink()
    assert "1 of 2 parts" in (message := refusal(original, CorruptFileError))
    assert "32 of the 64 rows" in message
    assert "consolidated.01.pth" in message


def test_a_gap_in_the_parts_is_named(original: Path) -> None:
    (original / "consolidated.00.pth").unlink()
    assert "lacks consolidated.00.pth" in refusal(original, CorruptFileError)


def test_parts_of_different_models_are_refused(original: Path, tmp_path: Path) -> None:
    wider = save_parts(tmp_path / "other", random_weights(Params(dim=128), torch.float16), Params(dim=128), 2)
    shutil.copy(wider / "consolidated.01.pth", original)
    assert "do not fit together: (64,), (128,)" in refusal(original, CorruptFileError)


def test_parts_of_different_types_are_refused(original: Path, tmp_path: Path) -> None:
    other = save_parts(tmp_path / "other", random_weights(MHA, torch.bfloat16), MHA, 2)
    shutil.copy(other / "consolidated.01.pth", original)
    assert "is F16 in consolidated.00.pth, but BF16 in consolidated.01.pth" in refusal(original, CorruptFileError)


def test_parts_that_should_hold_the_same_key_value_head_are_compared(convert: Convert, tmp_path: Path) -> None:
    folder = save_parts(tmp_path / "original", random_weights(GQA, torch.float16), GQA, 4)
    part = torch.load(folder / "consolidated.03.pth", weights_only=True)
    part["layers.1.attention.wv.weight"][3, 5] += 1
    torch.save(part, folder / "consolidated.03.pth")
    message = r"consolidated.02.pth: layers.1.attention.wv.weight and consolidated.03.pth: .* the same key-value head"
    with pytest.raises(CorruptFileError, match=message):
        convert(folder, "hf")
    assert not (tmp_path / "hf").exists()


def test_parts_with_shared_heads_are_shared_out_anew(convert: Convert, tmp_path: Path) -> None:
    original = save_parts(tmp_path / "original", random_weights(MP16, torch.bfloat16), MP16, 16)
    eight = save_parts(tmp_path / "eight", random_weights(MP16, torch.bfloat16), MP16, 8)
    written = convert(original, "written", form="pth", parts=8)
    for file in sorted(eight.glob("*.pth")):
        assert same_bytes(torch.load(file, weights_only=True), torch.load(written / file.name, weights_only=True))


def test_a_truncated_part_is_named(original: Path) -> None:
    file = original / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:-5000])
    assert str(file) in refusal(original, CorruptFileError)


def test_code_in_a_part_is_not_run(original: Path, tmp_path: Path) -> None:
    import os

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"norm.weight": Bomb()}, original / "consolidated.01.pth")
    assert "holds code instead of tensors" in refusal(original, CorruptFileError)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_tensor_is_named(original: Path) -> None:
    for file in original.glob("*.pth"):
        edit(file, lambda part: part.update({"layers.0.attention.wq.bias": torch.zeros(4)}))
    assert "layers.0.attention.wq.bias, which the original LLaMA does not have" in refusal(original, UnsupportedError)


def test_a_missing_tensor_is_named(original: Path) -> None:
    for file in original.glob("*.pth"):
        edit(file, lambda part: part.pop("layers.1.ffn_norm.weight"))
    assert "layers.1.ffn_norm.weight" in refusal(original, CorruptFileError)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layers", 3, "n_layers 3, but the tensors have 2"),
        ("dim", 4096, "dim 4096, but the tensors have 64"),
        ("vocab_size", 32000, "vocab_size 32000, but the tensors have 101"),
        ("n_heads", 7, "n_heads 7, which does not divide the tensors' width 64"),
        ("n_kv_heads", 4, "layers.0.attention.wk.weight is 64x64, but must be 32x64"),
    ],
)
def test_params_that_contradict_the_tensors_are_refused(original: Path, key: str, value: int, message: str) -> None:
    edit(original / "params.json", lambda params: params.update({key: value}))
    assert message in refusal(original, CorruptFileError)


def test_missing_params_are_asked_for(original: Path) -> None:
    (original / "params.json").unlink()
    assert "has no params.json" in refusal(original, ModelNotFoundError)


def test_a_number_of_parts_that_does_not_divide_the_heads_lists_those_that_do(folder: Path, smollm2: Path) -> None:
    assert "one of 1, 2, 4, 8" in refusal(folder, UsageError, form="pth", parts=3)
    assert "9 heads and 3 key-value heads" in (message := refusal(smollm2, UsageError, form="pth", parts=8))
    assert "one of 1, 3, 9" in message


def test_a_model_with_biases_has_no_pth_form(qwen2_folder: Path) -> None:
    message = refusal(qwen2_folder, UnsupportedError, form="pth")
    assert "Qwen2ForCausalLM" in message
    assert "bias" in message
    assert "calpaca models export" in message


@pytest.fixture
def qwen2_folder(tmp_path: Path) -> Path:
    """A tiny Qwen2, whose attention has biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen2")
    return tmp_path / "qwen2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, "is a GemmaForCausalLM; only LLaMA's"),
        ({"hidden_act": "gelu"}, "computes gelu where LLaMA has silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn'"),
        ({"head_dim": 16}, "8 heads of 16, but is 64 wide"),
        ({"tie_word_embeddings": False}, "lacks 1 tensors"),
    ],
)
def test_what_params_json_cannot_say_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    edit(folder / "config.json", lambda config: config.update(change))
    checkpoint = open_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    names = [name for name in checkpoint.tensors if name != "lm_head.weight" or "tie_word_embeddings" not in change]
    with pytest.raises(CalpacaError, match=message):
        pth_files([copied(checkpoint, name) for name in names], config)


def test_planned_tensors_of_any_origin_are_laid_out_in_parts(folder: Path, tmp_path: Path) -> None:
    """What `models merge --format pth` hands over: tensors that are computed when they are written."""
    from calpaca.core.checkpoint import torch_zip
    from calpaca.core.checkpoint.plan import computed
    from calpaca.core.checkpoint.stream import FileStream

    checkpoint, config = open_checkpoint(folder), json.loads((folder / "config.json").read_text())
    tensors = [
        computed(name, stored.dtype, stored.shape, lambda name=name: checkpoint.read(name) * 2, origin="doubled")
        for name, stored in checkpoint.tensors.items()
    ]
    (tmp_path / "doubled").mkdir()
    (tmp_path / "doubled" / "params.json").write_bytes(pth_params(tensors, config))
    for file in pth_files(tensors, config, 2):
        with FileStream(tmp_path / "doubled" / file.name, file.name) as stream:
            torch_zip.write(stream, file.tensors)
    expected = {name: tensor * 2 for name, tensor in random_weights(MHA, torch.float16).items()}
    assert same_bytes(load_parts(tmp_path / "doubled", MHA), expected)


# ---- what a folder is ---------------------------------------------------------------------------------------------


def test_a_source_is_told_in_words(original: Path, folder: Path, smollm2_gguf: Path) -> None:
    assert str(identify(original)).endswith("is an original LLaMA checkpoint in 2 parts (.pth)")
    assert identify(original / "consolidated.01.pth").path == original
    assert str(identify(folder)).endswith("is a Hugging Face folder (safetensors)")
    assert identify(smollm2_gguf).kind == "gguf"


def test_a_form_that_is_there_already_needs_no_plan(original: Path, folder: Path) -> None:
    assert plan_conversion(folder).plan is None
    assert plan_conversion(original, Target(parts=2)).plan is None
    assert plan_conversion(original, Target(parts=1)).plan is not None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "adapter_model.bin"], "calpaca models merge"),
        (["params.json"], "fetch the parts"),
        (["model.safetensors"], "no config.json"),
        (["a.txt"], "holds no model that can be converted"),
    ],
)
def test_other_folders_are_told_what_they_lack(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert message in refusal(tmp_path)


def test_the_folder_above_the_parts_names_those_below(original: Path) -> None:
    assert "Name a folder in it: 13B" in refusal(original.parent)


def test_targets_that_contradict_themselves_are_refused(original: Path) -> None:
    assert "has no parts" in refusal(original, UsageError, form="hf", parts=2)
    assert "--parts" in refusal(original, UsageError, form="pth", container="torch")
    assert "float32, bfloat16, float16" in refusal(original, UsageError, dtype="int4")


def test_an_original_checkpoint_loads_as_a_model_and_is_converted_once(
    original: Path, own_cache: Path, small_pieces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Runtime(Settings()) as runtime:
        with caplog.at_level("INFO", logger="calpaca"):
            found = resolve_model(str(original), runtime, format="hf")
        assert found.name == "13B"
        assert found.path.is_relative_to(own_cache)
        assert (found.path / "config.json").is_file()
        assert "is an original LLaMA checkpoint in 2 parts (.pth): it is converted" in caplog.text
        caplog.clear()
        assert resolve_model(str(original), runtime, format="hf").path == found.path
        assert not caplog.text
        with pytest.raises(UnsupportedError, match="13B is an original LLaMA checkpoint and there is no GGUF file"):
            resolve_model(str(original), runtime, format="gguf")


def test_a_loaded_original_checkpoint_computes_what_it_should(
    tmp_path: Path, own_cache: Path, small_pieces: Path
) -> None:
    """As Meta ships it: the tokenizer lies in the folder above the parts."""
    from calpaca.core.files import find_files
    from calpaca.core.spec import ModelSpec
    from calpaca.core.weights import load_weights

    params = Params(vocab_size=2000, n_kv_heads=4)
    weights = random_weights(params, torch.float32)
    original = save_parts(tmp_path / "llama" / "7B", weights, params, 2)
    shutil.copy(small_pieces / "tokenizer.model", original.parent)
    with Runtime(Settings()) as runtime:
        loaded = load_weights(find_files(ModelSpec(model=str(original), dtype="float32", device="cpu"), runtime))
    token_ids = loaded.tokenizer.encode("The observatory opens at night.", special_tokens=True)
    assert token_ids[0] == 1
    assert loaded.eos_ids == (2,)
    with torch.inference_mode():
        found = loaded.model(torch.tensor([token_ids])).logits[0]
    torch.testing.assert_close(found, reference_logits(weights, params, token_ids), atol=2e-4, rtol=1e-4)


def test_a_tokenizer_that_is_too_long_for_the_embeddings_is_refused(original: Path, small_pieces: Path) -> None:
    shutil.copy(small_pieces / "tokenizer.model", original)
    assert "The tokenizer has 2000 tokens, but the model only 101 embedding rows" in refusal(original, ModelError)


def test_a_tokenizer_elsewhere_can_be_named(tmp_path: Path, convert: Convert, small_pieces: Path) -> None:
    params = Params(vocab_size=2000)
    original = save_parts(tmp_path / "7B", random_weights(params, torch.float16), params, 1)
    assert any("--tokenizer" in note for note in plan_conversion(original).notes)
    folder = convert(original, "hf", tokenizer=small_pieces)
    assert (folder / "tokenizer.model").read_bytes() == (small_pieces / "tokenizer.model").read_bytes()
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    assert "holds no tokenizer" in refusal(original, ModelNotFoundError, tokenizer=tmp_path)
    back = convert(folder, "back", form="pth")
    assert (back / "tokenizer.model").read_bytes() == (small_pieces / "tokenizer.model").read_bytes()
