"""Several processes of one command on this machine, as torchrun starts them, without importing torch to do so."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from calpaca.core.errors import UsageError
from calpaca.core.machine import describe_processor
from calpaca_trainer.errors import TrainingError

_GRACE = 10.0  # seconds for the others to end by themselves when one has failed
_GLANCE = 0.1


def must_launch(wanted: int | None) -> bool:
    """Whether others are to be started. Raises UsageError where torchrun started another number."""
    count = os.environ.get("WORLD_SIZE")
    if count is not None and wanted not in (None, int(count)):
        raise UsageError(f"--processes is {wanted}, and torchrun started {count}.", "Leave --processes out.")
    return count is None and wanted is not None and wanted > 1


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `calpaca ARGUMENTS` in `count` processes; the exit code of the first that fails, or 0.

    When one fails the others are ended. Raises TrainingError when one was killed.
    """
    children: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through `finally`
    try:
        for environment in _environments(count):
            command = [sys.executable, "-m", "calpaca", *arguments]
            children.append(subprocess.Popen(command, env=environment))  # noqa: S603  # calpaca itself
        code = _wait(children)
    finally:
        _end(children)
    if code < 0:
        raise TrainingError(
            f"One of the {count} processes was killed by {signal.Signals(-code).name}.",
            "The same command goes on after the last checkpoint.",
        )
    return code


def _environments(count: int) -> list[dict[str, str]]:
    """What torch.distributed reads, for each process. A processor's cores are shared out."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, describe_processor().usable_cores // count)),
    }
    return [{**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended, or one has failed; its code."""
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return min(failed, default=0)  # a killed one first: the others end because of it
        time.sleep(_GLANCE)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Give those that still run time to end, then end them."""
    deadline = time.monotonic() + _GRACE
    for act in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                act(child)
    for child in children:
        child.wait()
