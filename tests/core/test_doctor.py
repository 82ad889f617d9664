"""The doctor: what it finds, and that nothing which is broken stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from calpaca.core import machine as machine_module
from calpaca.core.doctor.advice import give_advice
from calpaca.core.doctor.engine_state import EngineState, describe_engine, probe
from calpaca.core.doctor.report import examine
from calpaca.core.doctor.surroundings import Folder, shown_environment
from calpaca.core.engine import EngineComponent
from calpaca.core.machine import Gpu, Machine, Memory, Processor, describe_machine, find_gpus, usable_cores
from calpaca.core.registry import Component
from calpaca.core.settings import RemoteSettings, Settings

GB = 10**9


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module("name", source)` writes a module that this process and its children can import."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name: str, source: str) -> Component:
        (tmp_path / f"{name}.py").write_text(source)
        return Component(name, "An engine.", f"{name}:open_engine", packages=(name,))

    return write


def test_the_machine_is_described() -> None:
    found = describe_machine()
    assert found.processor.name and found.processor.usable_cores > 0
    if sys.platform == "linux":
        assert found.processor.physical_cores and found.memory.total and found.memory.available
        assert found.memory.room is not None and found.memory.room <= found.memory.total


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import ctypes; ctypes.string_at(0)", "crashes (signal 11)"),
        ("import os; os.abort()", "crashes (signal 6)"),
        ("raise ImportError('libfoo.so.2: cannot open shared object file')", "libfoo.so.2"),
        ("import time; time.sleep(60)", "takes more than 1 s"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os; os.write(1, b'\\xff\\xfe noise'); os.write(2, b'\\xff noise')", None),
    ],
)
def test_an_engine_that_cannot_be_imported_is_a_line(module, source: str, error: str | None) -> None:
    engine = module("odd_engine", source)
    found = describe_engine(engine, Settings(), 1.0 if "sleep" in source else 30.0)
    assert found.state == ("ready" if error is None else "broken")
    assert error is None or error in found.error


def test_an_engine_that_is_not_installed_comes_with_the_line_that_installs_it() -> None:
    engine = Component("fast", "Fast.", "nowhere:open", extra="fast", packages=("surely_not_installed",))
    found = describe_engine(engine, Settings(), 5)
    assert (found.state, found.install) == ("not installed", "pip install 'calpaca[fast]'")
    other = describe_engine(replace(engine, extra=None), Settings(), 5)
    assert other.install == "pip install surely_not_installed"


def test_a_remote_engine_shows_its_servers_without_passwords() -> None:
    settings = Settings(remote=RemoteSettings(endpoints=("http://me:secret@gpu:8000/v1",)))
    found = describe_engine(EngineComponent("remote", "Asks.", "x:y", local=False), settings, 5)
    assert (found.state, found.details) == ("asks servers", {"endpoints": "http://gpu:8000/v1"})


def test_the_transformers_engine_tells_threads_and_cuda(smollm2) -> None:
    details, error = probe(Component("t", "T.", "calpaca.core.engines.transformers:open_engine", packages=("torch",)))
    assert error is None
    assert int(details["threads"]) >= 1 and details["cuda"]


def test_no_key_or_password_is_shown() -> None:
    variables = {
        "CALPACA_API_KEY": "sk-1", "HF_TOKEN": "hf-2", "HTTPS_PROXY": "http://me:pass3@proxy:8080", "PATH": "/bin",
        "CALPACA_REMOTE__ENDPOINTS": '["http://me:pass4@gpu/v1", "http://b/v1"]', "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    shown = shown_environment(variables)
    assert shown == {
        "CALPACA_API_KEY": "(set)",
        "CALPACA_REMOTE__ENDPOINTS": '["http://gpu/v1", "http://b/v1"]',
        "HF_TOKEN": "(set)",
        "HTTPS_PROXY": "http://proxy:8080",
        "OMP_NUM_THREADS": "2",
    }


def test_whatever_is_broken_is_a_problem_and_no_traceback(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calpaca.toml").write_text("modle = 1")
    monkeypatch.setattr("calpaca.core.doctor.report.describe_machine", lambda: 1 / 0)
    monkeypatch.setattr("calpaca.core.doctor.report.describe_folders", lambda: 1 / 0)
    report = examine([], problems=["A plugin is broken."])
    assert report.machine is None and report.folders == ()
    assert report.problems[0] == "A plugin is broken."
    assert "Unknown setting 'modle'" in report.problems[1]
    assert [problem.split(":")[0] for problem in report.problems[2:]] == [
        "Could not find out about the machine",
        "Could not find out about the folders",
    ]


def test_hubs_are_asked_only_when_told_to(web, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert examine([]).hubs == () and web.requests == []
    hubs = {each.name: each.error for each in examine([], online=True).hubs}
    assert hubs["Hugging Face"] is None and "cannot be reached" in hubs["ModelScope"]


# Advice --------------------------------------------------------------------------------------------------------------

AMD64 = Processor("Some processor", "x86_64", 8, 8, 8.0, ("AVX2",), 0.1)
QUIET = Machine("Linux", AMD64, Memory(64 * GB, 40 * GB))
READY = EngineState("transformers", "T.", "ready", details={"cuda": "torch was built without it"})


@pytest.fixture(autouse=True)
def no_variables(monkeypatch, tmp_path) -> None:
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_ENDPOINT", "CALPACA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CALPACA_DATA", str(tmp_path / "data"))


def advice(machine: Machine = QUIET, engines=(READY,), folders=()) -> str:
    return "\n".join(give_advice(machine, engines, folders))


def test_a_good_machine_gets_no_advice() -> None:
    assert advice() == ""


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        ({"load": 7.0}, "set OMP_NUM_THREADS=1"),
        ({"load": 6.5}, "set OMP_NUM_THREADS=2"),
        ({"physical_cores": 4}, "Two threads share each of the 4 cores: set OMP_NUM_THREADS=4"),
        ({"usable_cores": 2.5}, "A container grants 2.5 cores: set OMP_NUM_THREADS=2"),
    ],
)
def test_threads_that_would_wait_for_each_other_are_advised_against(processor: dict, words: str) -> None:
    assert words in advice(replace(QUIET, processor=replace(AMD64, **processor)))


def test_too_many_threads_are_told(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert "OMP_NUM_THREADS is 16, but 8 cores" in advice()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert advice(replace(QUIET, processor=replace(AMD64, load=99.0))) == ""


def test_little_memory_or_disk_and_folders_that_cannot_be_written_are_told() -> None:
    poor = replace(QUIET, memory=Memory(64 * GB, 40 * GB, limit=GB))
    folders = [Folder("cache", "/x", free=GB), Folder("data", "/y", free=GB, writable=False)]
    told = advice(poor, folders=folders)
    assert "Only 1.0 GB of memory are free" in told
    assert "Only 1.0 GB are free where the cache lies" in told
    assert "/y cannot be written: set CALPACA_DATA" in told


def test_faster_engines_for_this_processor_are_named() -> None:
    lacking = [
        READY,
        EngineState("openvino", "O.", "not installed", install="pip install 'calpaca[openvino]'"),
        EngineState("llama_cpp", "L.", "not installed", install="pip install 'calpaca[llama-cpp]'"),
    ]
    assert "calpaca[openvino]" in advice(engines=lacking) and "calpaca[llama-cpp]" in advice(engines=lacking)
    arm = replace(QUIET, processor=replace(AMD64, architecture="aarch64", instruction_sets=("NEON",)))
    assert "openvino" not in advice(arm, lacking) and "calpaca[llama-cpp]" in advice(arm, lacking)


def test_nothing_installed_and_a_gpu_that_torch_cannot_use_are_told() -> None:
    none = EngineState("transformers", "T.", "not installed", install="pip install 'calpaca[torch]'")
    assert "No engine can run a model here: pip install 'calpaca[torch]'" in advice(engines=[none])
    gpu = replace(QUIET, gpus=(Gpu("NVIDIA H100"),))
    assert "torch cannot use the NVIDIA H100" in advice(gpu)
    blind = replace(READY, details={"cuda": "no device"})
    assert "torch sees no NVIDIA H100" in advice(gpu, [blind])


def test_several_engines_are_worth_measuring() -> None:
    assert "calpaca bench engines" in advice(engines=[READY, replace(READY, name="openvino")])


# Other machines ------------------------------------------------------------------------------------------------------


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 81000, 580.1, 9.0'\n"
        "echo 'NVIDIA GB10, [N/A], [N/A], 580.1, 12.1'\necho 'a warning'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    h100, gb10 = find_gpus()
    assert (h100.name, h100.memory_total, h100.driver) == ("NVIDIA H100 80GB HBM3", 81559 << 20, "580.1")
    assert gb10.memory_total is None
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 9\n")
    assert find_gpus() == ()


def test_arm_flags_and_container_limits_are_read(monkeypatch) -> None:
    files = {
        "/proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp sve bf16 i8mm\n",
        "/sys/fs/cgroup/cpu.max": "150000 100000\n",
        "/sys/fs/cgroup/memory.max": f"{4 * GB}\n",
        "/sys/fs/cgroup/memory.current": f"{GB}\n",
        "/proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n",
    }
    monkeypatch.setattr(machine_module, "_read", lambda path: files.get(str(path), ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    found = describe_machine()
    assert found.processor.instruction_sets == ("NEON", "NEON dot product", "I8MM", "BF16", "SVE")
    assert usable_cores() == 1.5
    assert (found.memory.total, found.memory.limit, found.memory.room) == (16000000 * 1024, 3 * GB, 3 * GB)


def test_no_limit_is_none(monkeypatch) -> None:
    monkeypatch.setattr(machine_module, "_read", lambda path: "max 100000" if str(path).endswith("cpu.max") else "max")
    assert usable_cores() == usable_cores() // 1
    assert describe_machine().memory.limit is None


WITHOUT_TORCH = """
import json, sys, time
for name in ("torch", "transformers", "psutil"):
    sys.modules[name] = None
from calpaca.cli.main import main
code = main(["doctor", "--json"])
assert not {"torch", "transformers", "langchain_core"} & {name for name, module in sys.modules.items() if module}
sys.exit(code)
"""


def test_it_needs_no_torch_and_imports_none(tmp_path) -> None:
    environment = {**os.environ, "CALPACA_CACHE": str(tmp_path), "CALPACA_CONFIG": str(tmp_path)}
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    engines = {each["name"]: each for each in json.loads(result.stdout)["engines"]}
    assert engines["transformers"]["install"] == "pip install 'calpaca[torch]'"
    assert time.monotonic() - started < 60


def test_folders_are_measured(tmp_path, monkeypatch) -> None:
    from calpaca.core.doctor import surroundings

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file").write_bytes(b"x" * 1000)
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "cache" / "file")
    monkeypatch.setenv("CALPACA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there"))
    cache, _, hub = surroundings.describe_folders()
    assert 1000 < cache.size < 1200 and cache.whole and cache.free and cache.writable
    assert (hub.size, hub.path) == (0, str(tmp_path / "not" / "there" / "hub")) and hub.free
    monkeypatch.setattr(surroundings, "_WALK_SECONDS", -1.0)
    assert not surroundings.describe_folders()[0].whole


def test_the_folder_of_a_file_is_found(tmp_path, monkeypatch) -> None:
    """A cache path that is a file is an odd thing, not a crash."""
    file = Path(tmp_path / "file")
    file.touch()
    monkeypatch.setenv("CALPACA_CACHE", str(file))
    assert examine([]).folders[0].path == str(file)
