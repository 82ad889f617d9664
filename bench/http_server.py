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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
def serving(**fields: Any) -> Iterator[tuple[int, Any, Any]]:
    """A server on a port of this machine, its model and its queue."""
    options = ServeOptions(model="smollm2-135m-instruct", engine="transformers", device="cpu", port=0, **fields)
    with build_runtime(Settings()) as runtime:
        models = ServedModels(runtime, runtime.check(options.spec()))
        model = models.main.load()
        app, api = build_app(models, options, {})
        listener = open_socket(options.host, 0)
        server = Server(app, api, options)
        thread = threading.Thread(target=run, args=[server, listener])
        thread.start()
        yield listener.getsockname()[1], model, api.admission
        server.should_exit = True
        thread.join()


def clients(kind: str, *arguments: object) -> subprocess.Popen[str]:
    """This file in another process, as clients."""
    command = [sys.executable, __file__, "--as-client", json.dumps([kind, *arguments])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def ask(port: int, tokens: int, name: object = "") -> None:
    """Read one stream over a bare socket, to its end."""
    text = f"Client {name}: count from one to one thousand, in words."
    fields = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0, "stream": True}
    fields["logit_bias"] = {"0": -100, "2": -100}  # the tokens that end an answer: all are of the same length
    body = json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        while (line := await reader.readline()) and line != b"data: [DONE]\n":
            pass
    finally:
        writer.close()


async def together(port: int, tokens: int, count: int) -> None:
    """`count` streams at once."""
    await asyncio.gather(*(ask(port, tokens, number) for number in range(count)))


async def one_by_one(port: int, tokens: int = 1) -> None:
    """A stream for each line on stdin; its seconds are printed."""
    for _ in sys.stdin:
        begin = time.perf_counter()
        await ask(port, tokens)
        print(time.perf_counter() - begin, flush=True)


def processor_time(count: int, tokens: int) -> None:
    with serving(temperature=0.0) as (port, model, _):
        thread = model.engine.batch._thread
        clock = time.pthread_getcpuclockid(thread.ident)
        clients("together", port, 4, 2).wait()  # everything is imported and warm
        whole, engine = time.process_time(), time.clock_gettime(clock)
        clients("together", port, tokens, count).wait()
        engine = time.clock_gettime(clock) - engine
        own = time.process_time() - whole - engine
    print(
        f"{count} clients, {tokens} tokens each: engine {engine:.2f} s, server {own:.2f} s of processor time "
        f"({own / count * 1e3:.1f} ms a request, {own / count / tokens * 1e3:.3f} ms a token); ratio {own / engine:.3f}",
        flush=True,
    )


def latency(rounds: int = 200) -> None:
    """One token, over HTTP and asked of the engine directly, in turns, without other load."""
    with serving(temperature=0.0) as (port, model, _):

        def direct() -> float:
            begin = time.perf_counter()
            text = "Client : count from one to one thousand, in words."
            model.chat([{"role": "user", "content": text}], Sampling(max_new_tokens=1)).result()
            return time.perf_counter() - begin

        with clients("one_by_one", port) as client:
            pairs = [(float(answer(client)), direct()) for _ in range(rounds)][10:]
            client.stdin.close()
    ranked = [sorted(times) for times in zip(*pairs, strict=True)]
    median, high = ((ranked[0][at] - ranked[1][at]) * 1e3 for at in (len(pairs) // 2, int(0.95 * len(pairs))))
    print(f"added latency of a streamed request: median {median:.1f} ms, at 95 % {high:.1f} ms", flush=True)


def queue(waiting: int, tokens: int = 200, rounds: int = 3) -> None:
    """A stream with others waiting behind it and without, in turns: its time and the processor's."""
    with serving(temperature=0.0, max_running=1, max_waiting=waiting + 1) as (port, _, admission):
        measured = []
        for number in range(rounds):
            for count in (0, waiting):
                holder = clients("together", port, 4000, 1)
                wait_until(lambda: admission.running == 1)
                stream = clients("one_by_one", port, tokens)
                stream.stdin.write("\n")
                stream.stdin.flush()
                wait_until(lambda: admission.waiting == 1)
                crowd = clients("together", port, 8, count)
                wait_until(lambda count=count: admission.waiting == count + 1)
                begin, processor = time.perf_counter(), time.process_time()
                holder.kill()  # its slot goes to the stream, while all others wait
                stream.stdout.readline()
                measured.append((time.perf_counter() - begin, time.process_time() - processor))
                print(f"round {number}, {count} waiting: {measured[-1][0]:.2f} s", file=sys.stderr, flush=True)
                for each in (holder, stream, crowd):
                    each.kill()
                    each.communicate()
                wait_until(lambda: admission.running == admission.waiting == 0)
    alone, beside = measured[::2], measured[1::2]
    wall, processor = (statistics.median(b[at] / a[at] for a, b in zip(alone, beside, strict=True)) for at in (0, 1))
    print(f"a stream before {waiting} waiting ones takes {wall:.3f} times as long, {processor:.3f} of processor time")


def answer(client: subprocess.Popen[str]) -> str:
    """Have a client of `one_by_one` ask; the seconds it took."""
    client.stdin.write("\n")
    client.stdin.flush()
    return client.stdout.readline()


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--as-client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_client:
        kind, *arguments = json.loads(options.as_client)
        asyncio.run({"together": together, "one_by_one": one_by_one}[kind](*arguments))
        return
    import torch

    torch.set_num_threads(1)
    processor_time(options.clients, options.tokens)
    latency()
    queue(options.waiting)


if __name__ == "__main__":
    main()
