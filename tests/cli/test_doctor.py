"""`llm-boost doctor`: what it reads of a machine, what it says, and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_boost import _native
from llm_boost.cli import doctor
from llm_boost.errors import ConfigError


@pytest.fixture(autouse=True)
def fixed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"int8": 900e9, "bf16": None, "fp32": 200e9}
    monkeypatch.setattr(_native, "probe_bandwidth", lambda threads, megabytes: 30e9 + threads)
    monkeypatch.setattr(_native, "probe_dot_rate", lambda kind, threads: rates[kind])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An invented machine: two cores of two hardware threads each, 8 MiB of cache a core."""
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}"
        pair = "0,2" if cpu % 2 == 0 else "1,3"
        (folder / "topology").mkdir(parents=True)
        (folder / "topology/thread_siblings_list").write_text(pair + "\n")
        for index, (level, size) in enumerate([(1, "32K"), (3, "8192K")]):
            cache = folder / f"cache/index{index}"
            cache.mkdir(parents=True)
            for name, value in (("level", level), ("size", size), ("shared_cpu_list", pair)):
                (cache / name).write_text(f"{value}\n")
    monkeypatch.setattr(doctor, "CPU_DIR", tmp_path)
    monkeypatch.setattr(doctor, "CGROUP_DIR", tmp_path)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    return tmp_path


def findings(cache: Path) -> dict[str, doctor.Finding]:
    return {finding.key: finding for finding in doctor.examine(cache)}


def test_cores_and_cache(machine: Path) -> None:
    assert doctor.find_cores() == doctor.Cores(logical=4, physical=2, quota=None)
    assert doctor.find_cores().threads == 2
    assert doctor.last_level_cache() == 16 << 20


@pytest.mark.parametrize(
    ("cpu_max", "quota", "threads"), [("max 100000", None, 2), ("150000 100000", 1.5, 1)]
)
def test_a_container_limits_the_threads(machine: Path, cpu_max: str, quota: float, threads: int) -> None:
    (machine / "cpu.max").write_text(cpu_max + "\n")
    cores = doctor.find_cores()
    assert (cores.quota, cores.threads) == (quota, threads)


def test_a_container_limits_the_memory(machine: Path) -> None:
    (machine / "memory.max").write_text("1000000\n")
    (machine / "memory.current").write_text("400000\n")
    assert doctor.memory() == (1000000, 600000)


def test_what_is_measured_becomes_a_bound(machine: Path, tmp_path: Path) -> None:
    found = findings(tmp_path)
    assert found["read_bandwidth"].data == {"one_thread": 30e9 + 1, "all_threads": 30e9 + 2, "threads": 2}
    assert "at most at 30.0/N tokens/s" in found["read_bandwidth"].meaning
    assert "at most at 450/N prompt tokens/s" in found["int8_dot_rate"].meaning
    assert found["bf16_dot_rate"].data is None
    assert "computed as float32" in found["bf16_dot_rate"].meaning


@pytest.mark.parametrize(("load", "word"), [(0.1, "free"), (3.0, "busy")])
def test_a_busy_machine_is_named(
    load: float, word: str, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert word in findings(tmp_path)["load"].meaning


def test_every_finding_is_one_line_with_a_meaning(tmp_path: Path) -> None:
    for finding in doctor.examine(tmp_path):
        for line in (finding.text, finding.meaning):
            assert line.strip()
            assert "\n" not in line


def test_the_forced_instruction_set_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "available_isas", lambda: ["avx2", "generic"])
    monkeypatch.delenv("LLM_BOOST_ISA", raising=False)
    assert findings(tmp_path)["instruction_sets"].data["chosen"] == "avx2"
    monkeypatch.setenv("LLM_BOOST_ISA", "generic")
    assert "avx2 is faster" in findings(tmp_path)["instruction_sets"].meaning
    monkeypatch.setenv("LLM_BOOST_ISA", "sse9")
    with pytest.raises(
        ConfigError, match="LLM_BOOST_ISA: got 'sse9', allowed on this processor: avx2, generic"
    ):
        doctor.examine(tmp_path)


def test_a_cache_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    cache = findings(tmp_path / "not/yet")["cache"].data
    assert cache["free"] > 0
    assert cache["writable"]
    assert not (tmp_path / "not").exists()


def test_a_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not findings(tmp_path / "file")["cache"].data["writable"]


def test_json_holds_the_findings(tmp_path: Path) -> None:
    result = CliRunner().invoke(doctor.doctor_command, ["--json", "--cache_dir", str(tmp_path)])
    assert result.exit_code == 0
    report = json.loads(result.output)
    assert report["cache"]["path"] == str(tmp_path)
    assert report["fp32_dot_rate"] == 200e9
    assert report["memory"]["available"] <= report["memory"]["total"]


def test_text_names_every_finding(tmp_path: Path) -> None:
    result = CliRunner().invoke(doctor.doctor_command, ["--cache_dir", str(tmp_path)])
    assert result.exit_code == 0
    for key in findings(tmp_path):
        assert key.replace("_", " ") in result.output
