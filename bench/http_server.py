"""What `calpaca serve` costs beside its engine: processor time, added latency, and what waiting streams do to a running one.

Run: python bench/http_server.py [--clients 32] [--tokens 64] [--waiting 1000]

The server runs in this process with one torch thread, its clients in another. Processor time of the engine is that of
its thread; everything else in this process is the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from calpaca.core.engine import Sampling
from calpaca.core.settings import Settings
from calpaca.plugins.wiring import build_runtime
from calpaca_openai_api.process import Server, open_socket, run
from calpaca_openai_api.served import ServedModels
from calpaca_openai_api.server import build_app
from calpaca_openai_api.settings import ServeOptions


@contextmanager
def serving(**fields: Any) -> Iterator[tuple[int, Any]]:
    """A server on a port of this machine, and its model."""
    options = ServeOptions(model="smollm2-135m-instruct", engine="transformers", device="cpu", port=0, **fields)
    with build_runtime(Settings()) as runtime:
        models = ServedModels(runtime, runtime.check(options.spec()))
        model = models.main.load()
        app, api = build_app(models, options, {})
        listener = open_socket(options.host, 0)
        server = Server(app, api.admission, options)
        thread = threading.Thread(target=run, args=[server, listener])
        thread.start()
        yield listener.getsockname()[1], model
        server.should_exit = True
        thread.join()


def clients(*arguments: object) -> subprocess.Popen[str]:
    """This file in another process, as clients."""
    command = [sys.executable, __file__, "--as-client", json.dumps(arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def ask(port: int, tokens: int, name: object = "") -> list[float]:
    """Read one stream over a bare socket; when each of its events came."""
    text = f"Client {name}: count from one to one thousand, in words."
    fields = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0, "stream": True}
    fields["logit_bias"] = {"0": -100, "2": -100}  # the tokens that end an answer: all are of the same length
    body = json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    times: list[float] = []
    try:
        while True:
            line = await reader.readline()
            if line.startswith(b"data: "):
                times.append(time.perf_counter())
            if not line or line == b"data: [DONE]\n":
                return times
    finally:
        writer.close()


async def client(port: int, tokens: int, count: int, waits: bool) -> None:
    """`count` streams at once; `waits` keeps them open until this process is killed."""
    tasks = [asyncio.create_task(ask(port, tokens, number)) for number in range(count)]
    if waits:
        await asyncio.sleep(3)
        print("open", flush=True)
    await asyncio.gather(*tasks)


def processor_time(count: int, tokens: int) -> None:
    with serving(temperature=0.0) as (port, model):
        thread = model.engine.batch._thread
        clock = time.pthread_getcpuclockid(thread.ident)
        clients(port, 4, 2, False).wait()  # everything is imported and warm
        whole, engine = time.process_time(), time.clock_gettime(clock)
        clients(port, tokens, count, False).wait()
        engine = time.clock_gettime(clock) - engine
        own = time.process_time() - whole - engine
    print(
        f"{count} clients, {tokens} tokens each: engine {engine:.2f} s, server {own:.2f} s of processor time "
        f"({own / count * 1e3:.1f} ms a request, {own / count / tokens * 1e3:.3f} ms a token); ratio {own / engine:.3f}"
    )


def latency(rounds: int = 200) -> None:
    """One token, over HTTP and asked of the engine directly, in turns, without other load."""
    with serving(temperature=0.0) as (port, model):

        async def over_http() -> float:
            begin = time.perf_counter()
            await ask(port, 1)
            return time.perf_counter() - begin

        def direct() -> float:
            begin = time.perf_counter()
            text = "Client : count from one to one thousand, in words."
            model.chat([{"role": "user", "content": text}], Sampling(max_new_tokens=1)).result()
            return time.perf_counter() - begin

        pairs = [(asyncio.run(over_http()), direct()) for _ in range(rounds)][10:]
    ranked = [sorted(times) for times in zip(*pairs, strict=True)]
    median, high = ((ranked[0][at] - ranked[1][at]) * 1e3 for at in (len(pairs) // 2, int(0.95 * len(pairs))))
    print(f"added latency of a streamed request: median {median:.1f} ms, at 95 % {high:.1f} ms")


def queue(waiting: int, tokens: int = 900, rounds: int = 2) -> None:
    """Time between tokens at the end of a stream, with others waiting for its slot and without, in turns."""
    with serving(temperature=0.0, max_running=1, max_waiting=waiting + 1) as (port, _):
        ratios = []
        for number in range(rounds):
            alone = asyncio.run(ask(port, tokens, number))
            begin = time.perf_counter()
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(asyncio.run, ask(port, tokens, f"again {number}"))
                time.sleep(0.2)
                crowd = clients(port, 8, waiting, True)
                assert crowd.stdout is not None
                crowd.stdout.readline()
                opened = time.perf_counter() - begin
                times = running.result()
            beside, before = ([b - a for a, b in pairwise(each[-tokens // 3 :])] for each in (times, alone))
            print(f"all wait after {opened:.1f} s, the stream ends after {times[-1] - begin:.1f} s", file=sys.stderr)
            ratios.append(statistics.median(beside) / statistics.median(before))
            crowd.kill()
            crowd.communicate()
            time.sleep(1)
    print(f"time between tokens beside {waiting} waiting streams: {statistics.median(ratios):.3f} times that alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--as-client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_client:
        asyncio.run(client(*json.loads(options.as_client)))
        return
    import torch

    torch.set_num_threads(1)
    processor_time(options.clients, options.tokens)
    latency()
    queue(options.waiting)


if __name__ == "__main__":
    main()
