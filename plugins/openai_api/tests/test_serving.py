"""The process: where it listens, its keys, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx2
import pytest

from calpaca.core.attaching import announced, offer
from calpaca.core.engine import Sampling
from calpaca.core.errors import UsageError
from calpaca.core.files import find_files
from calpaca.core.paths import data_dir
from calpaca.core.settings import Settings
from calpaca.core.spec import ModelSpec
from calpaca.plugins.wiring import build_runtime
from calpaca_openai_api.process import open_socket
from calpaca_openai_api.settings import digest, read_serve_options

LONG = [{"role": "user", "content": "Count from one to one thousand, in words, one number a line."}]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_a_public_address_needs_a_key_or_a_word(host, tmp_path):
    with pytest.raises(UsageError, match="other machines"):
        read_serve_options({"host": host}, {})
    assert read_serve_options({"host": host, "without_key": True}, {})[0].host == host
    file = tmp_path / "keys"
    file.write_text("first\nsecond\n")
    _, keys = read_serve_options({"host": host, "api_key_file": file}, {})
    assert [key.sha256 for key in keys.values()] == [digest("first"), digest("second")]


def test_this_machine_alone_is_the_default():
    options, keys = read_serve_options({}, {})
    assert (options.host, keys) == ("127.0.0.1", {})
    for host in ("localhost", "::1", "127.0.0.2"):
        read_serve_options({"host": host}, {})


def test_the_settings_hold_options_and_keys_and_typed_ones_win(tmp_path):
    section = {"port": 9000, "strict": True, "keys": {"ann": {"sha256": digest("a"), "concurrency": 2}}}
    options, keys = read_serve_options({"port": 9001}, section)
    assert (options.port, options.strict, keys["ann"].concurrency) == (9001, True, 2)
    for wrong in ({"prot": 1}, {"port": "x"}, {"keys": {"ann": {"sha256": "secret"}}}, {"keys": {"ann": "secret"}}):
        with pytest.raises(UsageError):
            read_serve_options({}, wrong)
    empty = tmp_path / "keys"
    empty.write_text("\n")
    for file in (empty, tmp_path / "nothing"):
        with pytest.raises(UsageError):
            read_serve_options({"api_key_file": file}, {})


def test_a_port_that_is_taken_is_said_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=str(port)):
            open_socket("127.0.0.1", port)


def test_sigterm_lets_running_streams_end_whole_and_then_the_process_ends_well(program):
    process, url = program("--dtype", "float32")

    def read(count: int) -> list[dict]:
        asked = [{"role": "user", "content": f"Count from {count} to one thousand, in words."}]
        body = {"messages": asked, "max_tokens": 40, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        with httpx2.stream("POST", f"{url}/chat/completions", json=body, timeout=120) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def text(chunks: list[dict]) -> str:
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])

    with ThreadPoolExecutor(4) as pool:
        expected = list(pool.map(read, range(4)))
        streams = [pool.submit(read, count) for count in range(4)]
        end = time.monotonic() + 60
        while "calpaca_requests_running 4.0" not in httpx2.get(url.removesuffix("/v1") + "/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        answers = [stream.result() for stream in streams]
    assert [text(answer) for answer in answers] == [text(answer) for answer in expected]
    assert [answer[-1]["usage"]["completion_tokens"] for answer in answers] == [
        answer[-1]["usage"]["completion_tokens"] for answer in expected
    ]
    assert process.wait(30) == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/models")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate that this machine has signed for itself, and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    files[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files[1].write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    return files


def test_https_is_spoken_with_the_certificate_that_is_named(program, certificate):
    process, url = program("--tls-cert", str(certificate[0]), "--tls-key", str(certificate[1]))
    assert url.startswith("https://127.0.0.1:")
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    body = {"messages": LONG, "max_tokens": 4}
    with httpx2.Client(verify=trusting) as client:
        answer = client.post(f"{url}/chat/completions", json=body, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 4
    with pytest.raises(httpx2.ConnectError, match="certificate"):
        httpx2.get(f"{url}/models")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_the_program_asks_for_the_key_in_its_file(program, tmp_path):
    file = tmp_path / "keys"
    file.write_text("sesame\n")
    _, url = program("--host", "0.0.0.0", "--api-key-file", str(file))
    url = url.replace("0.0.0.0", "127.0.0.1")
    assert httpx2.get(f"{url}/models").status_code == 401
    listed = httpx2.get(f"{url}/models", headers={"Authorization": "Bearer sesame"})
    assert listed.status_code == 200


def test_a_server_that_does_not_answer_is_named_and_the_model_is_loaded_here(smollm2, monkeypatch, caplog) -> None:
    monkeypatch.setattr("calpaca.core.engines.remote.server._PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, build_runtime(Settings(device="cpu")) as runtime:
        files = find_files(runtime.check(ModelSpec(model=str(smollm2))), runtime)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with announced(url, None, [offer("llama", files.fingerprint, files.spec)]):
            runtime.attaches = True
            assert runtime.model(str(smollm2)).engine.name == "transformers"
    assert url in caplog.text


@pytest.mark.slow
def test_a_question_on_the_command_line_is_answered_by_the_running_server(program, smollm2, e5, tmp_path) -> None:
    process, _ = program("--dtype", "float32")
    end = time.monotonic() + 30
    while not list((data_dir() / "servers").glob("*.json")):
        assert time.monotonic() < end
        time.sleep(0.05)
    handbook = tmp_path / "handbook.md"
    handbook.write_text("# Keys\n\nThe key of the archive is kept by Mrs Abendroth on the second floor.\n")
    command = [sys.executable, "-m", "calpaca", "run", "retrieval_qa", "--file", str(handbook), "--json"]
    command += ["--model", str(smollm2), "--dtype", "float32", "--temperature", "0", "--max-new-tokens", "20"]
    command += ["--question", "Who keeps the key of the archive?"]

    def ask() -> tuple[dict, str]:
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    attached, remarks = ask()
    assert "Asking the running server" in remarks
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    own, remarks = ask()
    assert "Asking the running server" not in remarks
    for key in ("answer", "sources", "usage", "model"):
        assert attached[key] == own[key]


@pytest.mark.slow
def test_a_server_that_dies_in_mid_answer_is_an_error_that_names_it(program, smollm2, e5, tmp_path) -> None:
    process, url = program("--dtype", "float32")
    end = time.monotonic() + 30
    while not list((data_dir() / "servers").glob("*.json")):
        assert time.monotonic() < end
        time.sleep(0.05)
    handbook = tmp_path / "handbook.md"
    handbook.write_text("# Keys\n\nThe key of the archive is kept by Mrs Abendroth on the second floor.\n")
    command = [sys.executable, "-m", "calpaca", "run", "retrieval_qa", "--file", str(handbook)]
    command += ["--model", str(smollm2), "--dtype", "float32", "--temperature", "0", "--max-new-tokens", "2000"]
    command += ["--question", "Tell a very long story about the keys.", "--repetition-penalty", "1.3"]
    metrics = url.removesuffix("/v1") + "/metrics"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, bufsize=1
    ) as asking:
        while "calpaca_requests_running 1.0" not in httpx2.get(metrics).text:
            assert asking.poll() is None
            time.sleep(0.05)
        assert asking.stdout is not None
        assert asking.stdout.read(1)  # the answer has begun
        process.kill()
        _, remarks = asking.communicate(timeout=60)
    assert asking.returncode == 3, remarks
    assert url.removesuffix("/v1") in remarks
    assert "Traceback" not in remarks


def test_a_running_server_is_asked_instead_of_loading_its_model_again(program, smollm2, tmp_path) -> None:
    file = tmp_path / "keys"
    file.write_text("sesame\n")
    process, url = program("--api-key-file", str(file))
    servers = data_dir() / "servers"
    end = time.monotonic() + 30
    while not list(servers.glob("*.json")):
        assert time.monotonic() < end
        time.sleep(0.05)
    with build_runtime(Settings()) as runtime:
        runtime.attaches = True
        model = runtime.model(str(smollm2))
        assert model.engine.name == "remote"
        assert model.engine.capabilities().details["endpoints"] == [url]
        assert model.files is not None
        assert model.fingerprint == model.files.fingerprint
        asked = [{"role": "user", "content": "Name a mountain."}]
        assert model.chat(asked, Sampling(max_new_tokens=8)).result(60).usage.completion_tokens == 8
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert not list(servers.glob("*.json"))


@pytest.mark.slow
def test_an_engine_that_is_killed_in_mid_stream_ends_that_stream_with_an_error_and_the_server_goes_on(program):
    pytest.importorskip("xllamacpp", reason="pip install 'calpaca[llama-cpp]'")
    process, url = program("--engine", "llama_cpp")
    told = [{"role": "user", "content": "Write a long story about a llama that crosses the mountains."}]
    body = {"messages": told, "max_tokens": 800, "temperature": 0}
    with httpx2.stream("POST", f"{url}/chat/completions", json={**body, "stream": True}, timeout=120) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        for _ in range(5):
            assert "error" not in json.loads(next(lines))
        (worker,) = workers(process)
        os.kill(worker, signal.SIGKILL)
        *_, error, done = lines
    assert done == "[DONE]"
    assert "ended unexpectedly (killed by SIGKILL)" in json.loads(error)["error"]["message"]
    answer = httpx2.post(f"{url}/chat/completions", json={**body, "max_tokens": 8}, timeout=120)
    assert answer.json()["choices"][0]["message"]["content"]
    assert "calpaca_requests_running 0.0" in httpx2.get(url.removesuffix("/v1") + "/metrics").text


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Processes that a program has started and that run an engine."""
    command = ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [line.split(maxsplit=1) for line in listed.stdout.splitlines()]
    return [int(pid) for pid, command in rows if "engines.process" in command]
