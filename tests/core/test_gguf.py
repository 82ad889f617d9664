"""GGUF files: headers, damage, and the conversion to a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from shutil import rmtree

import pytest

from calpaca.core import gguf
from calpaca.core.errors import CorruptFileError, ModelNotFoundError, UnsupportedError

CONVERT = (
    "import sys; from pathlib import Path; from calpaca.core.gguf import hf_folder; print(hf_folder(Path(sys.argv[1])))"
)


def _first_bytes(source: Path, target: Path, count: int) -> Path:
    with source.open("rb") as file:
        target.write_bytes(file.read(count))
    return target


def test_the_header_tells_what_the_model_is(smollm2_gguf: Path) -> None:
    header = gguf.check(smollm2_gguf)
    assert header.metadata["general.architecture"] == "llama"
    assert header.of_architecture("context_length") == 8192
    assert header.arrays["tokenizer.ggml.tokens"] == 49152
    assert header.parameters == 134_515_008
    assert header.main_type == "Q4_1"
    assert len(header.tensors) == 272


@pytest.mark.parametrize("count", [50_000_000, 98_362_431])
def test_a_truncated_file_is_said_with_both_lengths(smollm2_gguf: Path, tmp_path: Path, own_cache, count: int) -> None:
    file = _first_bytes(smollm2_gguf, tmp_path / "cut.gguf", count)
    with pytest.raises(CorruptFileError, match=f"cut.gguf is truncated: it has {count:,} bytes, .* 98,362,432"):
        gguf.hf_folder(file)
    assert not (own_cache / "converted").exists()


def test_a_file_that_ends_inside_its_header_is_said(smollm2_gguf: Path, tmp_path: Path, own_cache) -> None:
    file = _first_bytes(smollm2_gguf, tmp_path / "cut.gguf", 100_000)
    with pytest.raises(CorruptFileError, match="it has 100,000 bytes and ends inside its header"):
        gguf.hf_folder(file)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it has 0 bytes and ends inside its header"),
        (b"PK\3\4" + bytes(100), "does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1 is not 2 or 3"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(100), "ends inside its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xfe" + bytes(100), "decode"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 1000) + bytes(100), "1000 dimensions"),
    ],
)
def test_damaged_headers_are_said(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(CorruptFileError, match=reason):
        gguf.read_header(tmp_path / "bad.gguf")


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        gguf.read_header(tmp_path / "none.gguf")


def test_one_part_of_a_model_is_refused(tmp_path: Path) -> None:
    key = b"split.count"
    value = struct.pack("<Q", len(key)) + key + struct.pack("<IH", 2, 3)
    (tmp_path / "part.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value + bytes(64))
    with pytest.raises(UnsupportedError, match="one of 3 parts"):
        gguf.check(tmp_path / "part.gguf")


def test_an_architecture_that_transformers_cannot_read_is_said(tmp_path: Path, own_cache) -> None:
    key, name = b"general.architecture", b"unheard-of"
    value = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(name)) + name
    (tmp_path / "odd.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value + bytes(64))
    with pytest.raises(UnsupportedError, match=r"odd\.gguf cannot be read by transformers"):
        gguf.hf_folder(tmp_path / "odd.gguf")
    assert list((own_cache / "converted").iterdir()) == []


def test_the_folder_has_everything_that_loading_needs(smollm2: Path) -> None:
    from safetensors import safe_open

    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        file.name for file in smollm2.iterdir()
    }
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    with safe_open(smollm2 / "model.safetensors", framework="numpy") as weights:
        assert {str(weights.get_slice(name).get_dtype()) for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_the_folder_answers(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
    assert tokenizer.model_max_length == 8192


def _kill_conversion(source: Path, converted: Path, moment: str) -> bool:
    """Start a conversion and kill it when a path of this pattern appears; whether it was still running then."""
    with subprocess.Popen([sys.executable, "-c", CONVERT, str(source)], stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and not list(converted.glob(moment)):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return process.returncode == -signal.SIGKILL and not any(
        not path.name.startswith(".") for path in converted.iterdir()
    )


@pytest.mark.parametrize("moment", [".*.part", ".*.part/model.safetensors"], ids=["begun", "writing"])
def test_a_killed_conversion_leaves_nothing_that_looks_finished(
    smollm2_gguf: Path, own_cache: Path, moment: str
) -> None:
    converted = own_cache / "converted"
    while not _kill_conversion(smollm2_gguf, converted, moment):  # it was over before the signal came
        rmtree(converted)
    (leftover,) = converted.iterdir()
    assert leftover.name.startswith(".")
    from calpaca.core.lock import exclusive

    target = gguf.converted_folder(smollm2_gguf)
    assert not target.exists()
    with exclusive(target):  # the lock died with the process, and the next holder cleans up
        assert list(converted.iterdir()) == []


def test_two_processes_convert_once_whatever_lies_beside_the_file(
    smollm2_gguf: Path, smollm2: Path, own_cache: Path, tmp_path: Path
) -> None:
    """transformers takes a tokenizer.json beside a GGUF file for the file's own."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / "mine.gguf").symlink_to(smollm2_gguf)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    command = [
        sys.executable,
        "-c",
        f"import logging; logging.basicConfig(level='INFO'); {CONVERT}",
        str(folder / "mine.gguf"),
    ]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ends = [process.communicate() for process in [subprocess.Popen(command, **options) for _ in range(2)]]
    assert len({out for out, _ in ends}) == 1
    assert sum(err.count("Converting mine.gguf") for _, err in ends) == 1
    made = Path(ends[0][0].strip())
    for name in ("tokenizer.json", "model.safetensors", "config.json", "chat_template.jinja"):
        assert _digest(made / name) == _digest(smollm2 / name)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_chinese_model_with_k_quants_answers_from_a_passage(qwen: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen)
    model = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    question = "资料：小明今年十岁，住在杭州，养了一只叫豆豆的狗。问题：小明的狗叫什么名字？"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "豆豆" in tokenizer.decode(output[0][prompt["input_ids"].shape[1] :])
