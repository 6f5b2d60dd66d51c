"""What this process may use of the machine: cores and memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from pathlib import Path

CGROUP_MEMORY = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")


def default_threads() -> int:
    """One thread for each physical core that this process may run on, within the container's quota.

    Hyper-threads share a core's arithmetic and its path to memory: a second one on a core is no faster.
    """
    cpus = os.sched_getaffinity(0)
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota(len(cpus))))


def processor_name() -> str:
    """The model that the processor says it is."""
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def available_memory() -> int:
    """Bytes that can be allocated without swapping, within the container's limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limits = [int(text) for path in CGROUP_MEMORY if (text := _read(path).strip()).isdigit()]
    return min([available, *limits])


def release_free_memory() -> None:
    """Gives freed heap back to the system: a large tokenizer's file leaves 50 MB of it, kept by glibc."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _siblings(cpu: int) -> str:
    """A name for the core: the list of its hyper-threads."""
    return _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")).strip() or str(cpu)


def _quota(default: int) -> int:
    fields = _read(CGROUP_CPU).split()
    if len(fields) == 2 and fields[0].isdigit() and int(fields[1]) > 0:
        return max(1, int(fields[0]) // int(fields[1]))
    return default


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
