"""A server as the scripts before calpaca were: one request at a time over `generate` of transformers.

Run: python bench/load/serial.py PORT DTYPE. It streams, so that tokens count when they come.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from calpaca import runtime
from calpaca.core.sources import resolve_model


class Events(BaseStreamer):  # type: ignore[misc]
    """Writes an event for each token after the prompt."""

    def __init__(self, handler: BaseHTTPRequestHandler, tokenizer: Any) -> None:
        self._handler, self._tokenizer = handler, tokenizer
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self.send({"content": self._tokenizer.decode(value)})
        self._prompt = False

    def end(self) -> None:
        self._write("[DONE]")
        self._handler.wfile.write(b"0\r\n\r\n")

    def send(self, delta: dict[str, str]) -> None:
        self._write(json.dumps({"choices": [{"index": 0, "delta": delta}]}))

    def _write(self, data: str) -> None:
        """An event as a chunk of its own, so that clients see it when it is sent."""
        event = f"data: {data}\n\n".encode()
        self._handler.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))


class Serial(BaseHTTPRequestHandler):
    """Answers chat completions, greedily and of the length asked for."""

    protocol_version = "HTTP/1.1"
    model: Any
    tokenizer: Any

    def do_POST(self) -> None:
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        inputs = self.tokenizer.apply_chat_template(
            fields["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")  # else one client that stays keeps all others waiting
        self.end_headers()
        length, streamer = fields["max_tokens"], Events(self, self.tokenizer)
        try:
            with torch.inference_mode():
                self.model.generate(
                    **inputs, do_sample=False, min_new_tokens=length, max_new_tokens=length, streamer=streamer
                )
        except ConnectionError:
            pass  # the client is gone

    def log_message(self, *_: object) -> None:
        """Nothing: a line per request is no part of the comparison."""


class Queue(HTTPServer):
    """One request at a time; the others wait in the socket's queue."""

    request_queue_size = 1024


def main() -> None:
    port, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    with runtime() as sources:
        folder = resolve_model("smollm2-135m-instruct", sources, format="hf").path
    Serial.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    Serial.tokenizer = AutoTokenizer.from_pretrained(folder)
    with Queue(("127.0.0.1", port), Serial) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
