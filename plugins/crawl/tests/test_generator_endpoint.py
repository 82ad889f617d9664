"""Rows from an OpenAI-compatible server on this machine: several requests at once, and faults of the server."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from calpaca.cli.main import program
from calpaca.core.errors import CalpacaError
from calpaca.core.settings import read_settings
from calpaca.plugins.wiring import build_runtime

Answer = Callable[[int], tuple[int, str]]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Answer, delay: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.delay = answer, delay
        self.count, self.running, self.peak = 0, 0, 0
        self.lock = threading.Lock()
        self.body: bytes | None = None  # in place of every answer


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, json.dumps({"object": "list", "data": [{"id": "m", "owned_by": "somebody"}]}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        with server.lock:
            number, server.count = server.count, server.count + 1
            server.running += 1
            server.peak = max(server.peak, server.running)
        time.sleep(server.delay)
        status, text = server.answer(number)
        with server.lock:
            server.running -= 1
        if server.body is not None:
            self._send(200, server.body, "text/event-stream")
            return
        if status != 200:
            self._send(status, b'{"error": {"message": "not now"}}')
            return
        first = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
        last = {
            "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 9},
        }
        body = "".join(f"data: {json.dumps(each)}\n\n" for each in (first, last)) + "data: [DONE]\n\n"
        self._send(200, body.encode(), "text/event-stream")

    def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        with suppress(ConnectionError):  # a request that is no longer wanted was cancelled
            self.wfile.write(body)


@contextmanager
def endpoint(answer: Answer, delay: float = 0.0) -> Iterator[_Server]:
    server = _Server(answer, delay)
    thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def crawl(monkeypatch, tmp_path) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)

    def run(server: _Server, *arguments: str) -> Result:
        runtime = build_runtime(read_settings())
        monkeypatch.setattr("calpaca_crawl.commands.instructions.shared_runtime", lambda: runtime)
        model = f"http://127.0.0.1:{server.server_port}/v1#m"
        with runtime:
            return CliRunner().invoke(
                program, ["crawl", "instructions", "rows.jsonl", "--model", model, "--records", "1", *arguments]
            )

    return run


def row(number: int) -> str:
    text = " ".join(f"{chr(97 + (number * step) % 26)}{number * step + step}x{number}" for step in (1, 3, 5, 7, 9))
    return json.dumps({"rows": [{"instruction": f"Explain {text}", "input": "", "output": f"It is number {number}."}]})


def test_eight_requests_are_with_the_server_at_once_and_no_more(crawl) -> None:
    with endpoint(lambda number: (200, row(number)), delay=0.1) as server:
        result = crawl(server, "--max-rows", "24", "--in-flight", "8")
    assert result.exit_code == 0, (result.output, result.exception)
    assert server.peak == 8
    assert len(Path("rows.jsonl").read_text().splitlines()) == 24


def test_a_server_that_is_busy_now_and_then_is_asked_again(crawl) -> None:
    with endpoint(lambda number: (429, "") if number % 3 == 0 else (200, row(number))) as server:
        result = crawl(server, "--max-rows", "4", "--in-flight", "1")
    assert result.exit_code == 0, (result.output, result.exception)


def test_a_server_that_ignores_the_schema_is_asked_without_one(crawl) -> None:
    with endpoint(lambda number: (200, f"Gladly:\n```\n{row(number)}\n```")) as server:
        result = crawl(server, "--max-rows", "2", "--in-flight", "1")
    assert result.exit_code == 0, (result.output, result.exception)
    assert server.count == 3


@pytest.mark.parametrize("status", [401, 500])
def test_a_server_that_refuses_every_request_ends_the_run_with_its_words(crawl, status) -> None:
    with endpoint(lambda _: (status, "")) as server:
        result = crawl(server, "--in-flight", "1")
    assert isinstance(result.exception, CalpacaError)
    assert "not now" in result.exception.message
    assert server.count == 5


def test_requests_without_a_reply_count_towards_the_limits_of_this_run_and_the_next(crawl) -> None:
    limits = ("--in-flight", "1", "--max-new-tokens", "300", "--max-cost", "700", "--price-out", "1000000")
    with endpoint(lambda _: (500, "")) as server:
        first = crawl(server, *limits)
        asked = server.count
        second = crawl(server, *limits)
        assert server.count == asked
    assert (first.exit_code, second.exit_code) == (0, 0)
    report = json.loads(Path("rows.report.json").read_text())
    assert (report["stopped"], report["lost_completion_tokens"]) == ("max_cost", 600)
    assert 600 <= report["cost"] <= 700


def test_the_forecast_is_told_after_the_first_replies(crawl) -> None:
    with endpoint(lambda number: (200, row(number))) as server:
        result = crawl(server, "--max-rows", "6", "--in-flight", "2")
    assert "Forecast: 2 rows so far took" in result.stderr
    assert "6 rows will take about" in result.stderr


def test_a_server_that_never_answers_ends_with_the_runs_time(crawl) -> None:
    with endpoint(lambda number: (200, row(number)), delay=5.0) as server:
        result = crawl(server, "--max-time", "0.5", "--in-flight", "1")
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads(Path("rows.report.json").read_text())
    assert (report["stopped"], report["rows"]) == ("max_time", 0)
    assert report["seconds"] < 4


@pytest.mark.parametrize(
    "body",
    [b"<html>Welcome</html>", b'data: {"choices": [{"index": 0, "delta": {"con', b""],
    ids=["garbage", "half", "nothing"],
)
def test_an_answer_that_is_none_ends_the_run_with_a_message_and_is_counted(crawl, body) -> None:
    with endpoint(lambda _: (200, "")) as server:
        server.body = body
        result = crawl(server, "--in-flight", "1")
    assert isinstance(result.exception, CalpacaError), result.output
    report = json.loads(Path("rows.report.json").read_text())
    assert report["failed_requests"] or report["rejected"]
    assert report["rows"] == 0


@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid() != 0, reason="needs the right to mount a tiny disk")
@pytest.mark.slow
def test_a_full_disk_is_named_and_no_reply_is_asked_for_again(tmp_path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    with endpoint(lambda number: (200, row(number))) as server:
        model = f"http://127.0.0.1:{server.server_port}/v1#m"
        options = ["--model", model, "--records", "1", "--max-rows", "4", "--in-flight", "1"]
        command = [sys.executable, "-m", "calpaca", "crawl", "instructions", str(small / "rows.jsonl"), *options]
        mounted = f"mount -t tmpfs -o size=4k none {small} && exec {shlex.join(command)}"
        done = subprocess.run(["unshare", "--mount", "sh", "-c", mounted], capture_output=True, text=True, check=False)
        if "mount:" in done.stderr or "unshare:" in done.stderr:
            pytest.skip("mounting is not allowed here")
        assert done.returncode == 1
        assert "cannot be written: No space left on device" in done.stderr
        asked = server.count
        subprocess.run(command, check=True, capture_output=True)
        assert server.count == asked
    assert len((small / "rows.jsonl").read_text().splitlines()) == 4
