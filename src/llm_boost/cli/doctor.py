"""`llm-boost doctor`: what this machine has and can do, measured, and what each of it means for speed."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import click

from llm_boost import __version__
from llm_boost.config.locations import cache_folder
from llm_boost.engine.hardware import processor_name
from llm_boost.errors import ConfigError

CPU_DIR = Path("/sys/devices/system/cpu")
CGROUP_DIR = Path("/sys/fs/cgroup")
THP_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MIB, GB = 1 << 20, 1e9

# Bits that a weight takes once packed, scales included; the small share of an embedding table left out.
PACKED_BITS = {"bfloat16": 16.0, "int8": 8.25, "int4": 4.25}
ISA_MEANING = {
    "avx512_bf16": "512-bit vectors, dot instructions for int8 and bfloat16: the fastest kernels there are",
    "avx512_vnni": "512-bit vectors, dot instructions for int8; bfloat16 is computed as float32",
    "avx2": "256-bit vectors; an int8 dot takes three instructions where AVX-512 VNNI has one",
    "generic": "plain C++ without vector kernels: prompts take several times longer",
}
OPTIONAL = {
    "huggingface-hub": "`llm-boost pull OWNER/NAME` from Hugging Face",
    "torch": "reading pytorch_model*.bin",
    "transformers": "the reference tests, with torch",
}


@dataclass(frozen=True)
class Finding:
    key: str  # in JSON
    data: Any  # in JSON: bytes, bytes/s, operations/s, names
    text: str  # for people
    meaning: str  # for speed, in one line


def read(path: Path) -> str | None:
    """The text of a small system file, or None where this kernel or container has no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


# ---- the machine


@dataclass(frozen=True)
class Cores:
    logical: int  # that this process may use
    physical: int
    quota: float | None  # processors' worth of time that the container gets

    @property
    def threads(self) -> int:
        """Threads worth running: one a physical core, no more than the container's share."""
        return max(1, min(self.physical, int(self.quota or self.physical)))


def find_cores() -> Cores:
    usable = os.sched_getaffinity(0)
    siblings = {read(CPU_DIR / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in usable}
    share, _, period = (read(CGROUP_DIR / "cpu.max") or "max").partition(" ")
    return Cores(len(usable), len(siblings), None if share == "max" else int(share) / int(period))


def last_level_cache() -> int:
    """Bytes of all last-level caches that this process's processors reach; 0 if unknown."""
    sizes: dict[tuple[int, str], int] = {}  # (level, who shares it) -> bytes
    for cpu in os.sched_getaffinity(0):
        for index in (CPU_DIR / f"cpu{cpu}/cache").glob("index*"):
            size, level, shared = (read(index / name) for name in ("size", "level", "shared_cpu_list"))
            if size and level and shared and size.endswith("K"):
                sizes[int(level), shared] = int(size[:-1]) * 1024
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last)


def memory() -> tuple[int, int]:
    """Bytes in all and bytes free for a model, within the container's limit."""
    lines = (read(Path("/proc/meminfo")) or "").splitlines()
    table = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, available = table.get("MemTotal", 0), table.get("MemAvailable", 0)
    limit = read(CGROUP_DIR / "memory.max")
    if limit and limit != "max" and int(limit) < total:
        total = int(limit)
        available = min(available, total - int(read(CGROUP_DIR / "memory.current") or 0))
    return total, max(0, available)


# ---- findings, in the order in which they are shown


def about_processor(cores: Cores) -> list[Finding]:
    from llm_boost import _native

    isas = _native.available_isas()
    chosen = os.environ.get("LLM_BOOST_ISA") or isas[0]
    if chosen not in isas:
        raise ConfigError(f"LLM_BOOST_ISA: got {chosen!r}, allowed on this processor: {', '.join(isas)}")
    forced = "" if chosen == isas[0] else f" (LLM_BOOST_ISA forces it; {isas[0]} is faster)"
    text = f"{count('core', cores.physical)}, {count('hardware thread', cores.logical)}"
    if cores.quota is not None:
        text += f", limited to {cores.quota:g} processors by the container"
    cache = last_level_cache()
    return [
        Finding(
            "processor",
            {"name": processor_name(), "last_level_cache": cache},
            processor_name() + (f", {cache // MIB} MiB last-level cache" if cache else ""),
            "weights are far larger than this cache, so decode lives on memory bandwidth",
        ),
        Finding(
            "instruction_sets",
            {"available": isas, "chosen": chosen},
            f"{chosen}, of {', '.join(isas)}",
            ISA_MEANING.get(chosen, "kernels made for this processor") + forced,
        ),
        Finding(
            "cores",
            {"physical": cores.physical, "logical": cores.logical, "quota": cores.quota},
            text,
            f"run {count('thread', cores.threads)}, one a core"
            + (": hyper-threads share its arithmetic" if cores.logical > cores.physical else ""),
        ),
    ]


def about_load(cores: Cores) -> Finding:
    load = os.getloadavg()[0]
    busy = load > 0.25 * cores.logical
    return Finding(
        "load",
        load,
        f"{load:.1f} programs running, over the last minute",
        "the machine is busy: the rates below are lower than what it can do"
        if busy
        else "the machine is free",
    )


def about_memory(available: int, total: int) -> Finding:
    fits = ", ".join(f"{available * 8 / bits / GB:.1f} in {name}" for name, bits in PACKED_BITS.items())
    return Finding(
        "memory",
        {"total": total, "available": available},
        f"{total / GB:.1f} GB, {available / GB:.1f} GB available",
        f"holds so many billion weights: {fits}, less the KV cache",
    )


def about_bandwidth(threads: int, available: int) -> Finding:
    from llm_boost import _native

    # Larger than the caches, within reason.
    size = min(max(4 * last_level_cache(), 256 * MIB), 1024 * MIB, available // 4)
    megabytes = max(1, size // MIB)
    one = _native.probe_bandwidth(1, megabytes)
    rates = {1: one, threads: one if threads == 1 else _native.probe_bandwidth(threads, megabytes)}
    best = max(rates.values()) / GB
    limits = ", ".join(f"{best / (7 * bits / 8):.1f} in {name}" for name, bits in PACKED_BITS.items())
    return Finding(
        "read_bandwidth",
        {"one_thread": one, "all_threads": rates[threads], "threads": threads},
        ", ".join(f"{rate / GB:.1f} GB/s with {count('thread', n)}" for n, rate in rates.items()),
        f"a model of N GB decodes at most at {best:.1f}/N tokens/s; one of 7 billion weights: {limits}",
    )


def about_dots(threads: int) -> list[Finding]:
    from llm_boost import _native

    findings = []
    for kind, used_for in (("int8", "int8 and int4"), ("bf16", "bfloat16"), ("fp32", "float32")):
        rate = _native.probe_dot_rate(kind, threads)
        if rate is None:
            text, meaning = "no such instruction", f"{used_for} models are computed as float32"
        else:
            text = f"{rate / GB:.0f} billion operations/s with {count('thread', threads)}"
            bound = f"{rate / 2 / GB:.0f}/N prompt tokens/s"
            meaning = f"a model of N billion weights in {used_for} prefills at most at {bound}"
        findings.append(Finding(f"{kind}_dot_rate", rate, text, meaning))
    return findings


def about_pages() -> list[Finding]:
    modes = read(THP_ENABLED) or "[none]"
    mode = modes[modes.index("[") + 1 : modes.index("]")]
    meanings = {
        "always": "large buffers lie on 2 MB pages, so that few address look-ups miss",
        "madvise": "programs that ask get 2 MB pages; the rest pays a few per cent for address look-ups",
    }
    shm = Path("/dev/shm")
    size, free = (shutil.disk_usage(shm)[i] if shm.is_dir() else 0 for i in (0, 2))
    return [
        Finding(
            "huge_pages",
            mode,
            f"transparent huge pages: {mode}",
            meanings.get(
                mode, f"address look-ups cost a few per cent; root may write madvise to {THP_ENABLED}"
            ),
        ),
        Finding(
            "shared_memory",
            {"total": size, "free": free},
            f"/dev/shm: {size / GB:.1f} GB, {free / GB:.1f} GB free",
            "processes on one machine exchange data here; a single process needs none of it",
        ),
    ]


def about_software(cache: Path) -> list[Finding]:
    packages = {name: installed(name) for name in sorted(dependencies(), key=str.lower)}
    extras = {name: found for name in OPTIONAL if (found := installed(name))}
    lacking = [f"{name} ({use})" for name, use in OPTIONAL.items() if name not in extras]
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    room = free * 8 / PACKED_BITS["int8"] / GB
    return [
        Finding(
            "versions",
            {"llm-boost": __version__, "python": platform.python_version(), **packages},
            f"llm-boost {__version__}, Python {platform.python_version()}",
            ", ".join(f"{name} {found or 'missing!'}" for name, found in packages.items())
            or "run from a source tree that is not installed, so the packages it wants are unknown",
        ),
        Finding(
            "optional_packages",
            extras,
            ", ".join(f"{name} {found}" for name, found in extras.items()) or "none",
            "not installed: " + "; ".join(lacking) if lacking else "all that is of use is installed",
        ),
        Finding(
            "cache",
            {"path": str(cache), "free": free, "writable": writable},
            f"{cache}, {free / GB:.0f} GB free" + ("" if writable else ", not writable"),
            f"packed weights stay here, a second start only maps them; room for {room:.0f} billion in int8"
            if writable
            else "models cannot be packed here: choose a folder with --cache_dir or LLM_BOOST_CACHE",
        ),
    ]


def dependencies() -> list[str]:
    """Packages without which llm-boost does not run; none in a source tree that was never installed."""
    try:
        declared = [line for line in requires("llm-boost") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        return []
    return [match[0] for line in declared if (match := re.match(r"[\w.-]+", line))]


def count(thing: str, number: int) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def examine(cache: Path) -> list[Finding]:
    """Everything worth knowing about this machine; measures for a second or two."""
    cores = find_cores()
    total, available = memory()
    return [
        *about_processor(cores),
        about_load(cores),
        about_memory(available, total),
        about_bandwidth(cores.threads, available),
        *about_dots(cores.threads),
        *about_pages(),
        *about_software(cache),
    ]


_EXAMPLES = """\b
Examples:
  llm-boost doctor
  llm-boost doctor --json > machine.json
"""


@click.command("doctor", epilog=_EXAMPLES)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: bytes, bytes/s and operations/s.")
@click.option("--cache_dir", metavar="DIR", help="Cache folder to look at (default: ~/.cache/llm-boost).")
def doctor_command(as_json: bool, cache_dir: str | None) -> None:
    """Show what this machine can do, measured, and what each of it means for speed."""
    findings = examine(cache_folder(cache_dir))
    if as_json:
        click.echo(json.dumps({finding.key: finding.data for finding in findings}, indent=2))
        return
    width = max(len(finding.key) for finding in findings) + 2
    for finding in findings:
        click.echo(click.style(finding.key.replace("_", " ").ljust(width), bold=True) + finding.text)
        click.echo(" " * width + click.style(finding.meaning, dim=True))
