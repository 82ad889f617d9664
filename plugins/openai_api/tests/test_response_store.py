from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

from calpaca_openai_api.response_store import ResponseStore, Stored


def _stored(id: str, status: str = "completed", previous: str | None = None) -> Stored:
    return Stored({"id": id, "status": status}, [{"type": "message"}], previous)


def test_a_response_outlives_the_store_that_wrote_it_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a" / "responses.sqlite"
    ResponseStore(path, 10, 60).add("ann", _stored("resp_1"))
    again = ResponseStore(path, 10, 60)
    assert again.find("ann", "resp_1") == _stored("resp_1")
    assert again.find("bob", "resp_1") is None
    assert not again.delete("bob", "resp_1")
    assert again.delete("ann", "resp_1")
    assert again.find("ann", "resp_1") is None
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_number_and_age_are_bounded(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "s", 2, 60)
    for number in range(4):
        store.add("", _stored(f"resp_{number}"))
    assert [store.find("", f"resp_{number}") is not None for number in range(4)] == [False, False, True, True]
    assert ResponseStore(tmp_path / "s", 2, 0).find("", "resp_3") is None


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from calpaca_openai_api.response_store import *\n"
        "s = ResponseStore(Path(sys.argv[1]), 1000, 60)\n"
        "for n in range(50): s.add('', Stored({'id': f'{sys.argv[2]}_{n}', 'status': 'completed'}, []))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s"), name]) for name in ("a", "b")]
    assert [process.wait(60) for process in running] == [0, 0]
    store = ResponseStore(tmp_path / "s", 1000, 60)
    assert all(store.find("", f"{name}_{n}") for name in ("a", "b") for n in range(50))
