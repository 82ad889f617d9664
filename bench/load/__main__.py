"""`calpaca serve` under load beside a serial server: locust clients, loopback, same weights and threads, one after another.

Run: pip install --group load && python bench/load [--users 32] [--seconds 20] [--engine transformers]
     [--dtype bfloat16] [--tokens 32] [--rounds 1] [--server calpaca] [--json FILE] [--plot FILE]

Prints tokens per second of both and their ratio, seconds to the first token, between tokens and of whole answers (50 %
and 95 %; of the last round), and the memory of each server before and after each round.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

HERE = Path(__file__).parent
START_SECONDS = 60
MIB = 1 << 20


def server_command(name: str, port: int, options: argparse.Namespace) -> list[str]:
    """How to start one of the two servers."""
    if name == "serial":
        return [sys.executable, str(HERE / "serial.py"), str(port), options.dtype]
    command = [sys.executable, "-m", "calpaca", "serve", "--model", "smollm2-135m-instruct", "--port", str(port)]
    return [*command, "--engine", options.engine, "--dtype", options.dtype, "--device", "cpu"]


@contextmanager
def serving(name: str, options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server that has answered a first question: its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"CALPACA_DATA": str(folder / "data"), "HF_HUB_OFFLINE": "1"}
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(server_command(name, port, options), stdout=log, stderr=log, env=os.environ | places)
    address = f"http://127.0.0.1:{port}"
    try:
        ask_first(address, process, folder / f"{name}.log")
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def ask_first(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Ask until there is an answer."""
    fields = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stream": True}
    fields["model"] = "smollm2-135m-instruct"
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            httpx.post(f"{address}/v1/chat/completions", json=fields, timeout=START_SECONDS).raise_for_status()
            return
        except httpx.ConnectError:
            time.sleep(0.2)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def load(address: str, options: argparse.Namespace, report: Path) -> dict[str, Any]:
    """What the clients saw. locust patches sockets and threads, so it has a process of its own."""
    command = [sys.executable, "-m", "locust", "-f", str(HERE / "clients.py"), "--headless", "--host", address]
    command += ["--users", str(options.users), "--spawn-rate", str(options.users)]
    command += [
        "--run-time",
        f"{options.seconds}s",
        "--only-summary",
        "--loglevel",
        "ERROR",
        "--exit-code-on-error",
        "0",
    ]
    told = {"LOAD_REPORT": str(report), "LOAD_TOKENS": str(options.tokens)}
    subprocess.run(
        command, check=True, env=os.environ | told, stdout=subprocess.DEVNULL, timeout=options.seconds + START_SECONDS
    )
    return dict(json.loads(report.read_text()))


def measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One server under load: figures, and when its tokens came, in seconds from the first."""
    with serving(name, options, folder) as (address, process):
        memories = [memory(process)]
        for _ in range(options.rounds):
            seen = load(address, options, folder / f"{name}.json")
            memories.append(memory(process))
    times = np.sort(np.array(seen["tokens"]))
    if not times.size:
        raise SystemExit(f"{name}: no token in {options.seconds} s, {seen['failures']} failures")
    found: dict[str, Any] = {"tokens_per_second": times.size / options.seconds, "answers": len(seen["totals"])}
    found |= {key: shares(seen[key]) for key in ("first", "gaps", "totals")}
    found |= {"failures": seen["failures"], "memory_mib": memories}
    return found | {"times": (times - times[0]).round(3).tolist()}


def memory(process: psutil.Process) -> float:
    """Resident memory of a process and its children, in MiB."""
    return round(sum(each.memory_info().rss for each in (process, *process.children(recursive=True))) / MIB, 1)


def shares(values: list[float]) -> dict[str, float]:
    """The median and what 95 % stay within."""
    return {f"p{share}": round(float(np.percentile(values, share)), 4) for share in (50, 95)} if values else {}


def describe(name: str, found: dict[str, Any]) -> str:
    parts = [f"{found['tokens_per_second']:.1f} tokens/s", f"{found['answers']} answers"]
    for key, label in (("first", "first token"), ("gaps", "gap"), ("totals", "answer")):
        if found[key]:
            parts.append(f"{label} {found[key]['p50']:.3f} s (95 %: {found[key]['p95']:.3f})")
    parts.append(f"memory {', '.join(f'{each:.0f}' for each in found['memory_mib'])} MiB")
    return f"{name}: " + ", ".join([*parts, f"{found['failures']} failures"])


def plot(results: dict[str, dict[str, Any]], seconds: int, title: str, file: Path) -> None:
    """Tokens in each second, of both servers."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for name, found in results.items():
        counts, edges = np.histogram(found["times"], bins=seconds, range=(0, seconds))
        axes.stairs(counts, edges, label=name)
    axes.set(xlabel="seconds", ylabel="tokens per second", title=title, ylim=(0, None))
    axes.legend()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--server",
        choices=["calpaca", "serial"],
        help="only this one, compared with nothing: neither --json nor --plot",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.server] if options.server else ["calpaca", "serial"]:
            results[name] = measure(name, options, Path(folder))
            print(describe(name, results[name]), flush=True)
    if options.server:
        return
    ratio = results["calpaca"]["tokens_per_second"] / results["serial"]["tokens_per_second"]
    title = f"{options.users} clients, {options.engine}, {options.dtype}"
    print(f"{title}: {ratio:.1f} times the serial server")
    if options.json:
        options.json.write_text(json.dumps({"options": title, "ratio": ratio, **results}) + "\n")
    if options.plot:
        plot(results, options.seconds, title, options.plot)


if __name__ == "__main__":
    main()
