"""Facts about the machine: cores, CPU name, memory, for defaults and for reports.

For `machine.py` (how many threads), `bench` and `info`. It is apart because it reads
the operating system and nothing else: no other module of this package is imported
here, and every reader of `/sys`, `/proc` or cgroup files takes its folder as an
argument, so that a test can hand in a made-up machine.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_SYS: Final = Path("/sys")
_PROC: Final = Path("/proc")
_CGROUP: Final = Path("/sys/fs/cgroup")


def default_threads() -> int:
    """Threads to compute with: one per physical core that this process may use, at least 1.

    The cores are those of the process's affinity mask. A cgroup CPU quota caps them,
    rounded down: the threads of one forward pass wait for each other, and a thread
    that the quota puts to sleep holds up all the others.
    """
    cores = physical_cores()
    quota = cgroup_cpu_quota()
    if quota is not None:
        cores = min(cores, int(quota))
    return max(1, cores)


def physical_cores() -> int:
    """Physical cores among the CPUs that this process may run on, at least 1.

    Where the system does not tell which CPUs share a core, every CPU counts as one.
    """
    cpus = usable_cpus()
    return count_cores(cpus) or max(1, len(cpus))


def usable_cpus() -> frozenset[int]:
    """Numbers of the logical CPUs that this process may run on."""
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def count_cores(cpus: Iterable[int], sys_root: Path = _SYS) -> int | None:
    """Distinct physical cores among `cpus`, by the topology files of Linux.

    Two CPUs share a core if the kernel lists them as siblings. Returns None if any of
    the CPUs has no topology file, as on other systems and in some sandboxes.
    """
    cores = set()
    for cpu in cpus:
        topology = sys_root / "devices/system/cpu" / f"cpu{cpu}" / "topology"
        # core_cpus_list replaced thread_siblings_list in Linux 5.2; both mean the same.
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        if not siblings:
            return None
        cores.add(siblings)
    return len(cores) or None


def cgroup_cpu_quota(
    cgroup_root: Path = _CGROUP, own_cgroups: Path = _PROC / "self/cgroup"
) -> float | None:
    """CPUs' worth of time that cgroups (version 1 or 2) grant this process, or None.

    Limits are inherited, so the smallest one on the way from the process's group up to
    the root counts. Inside a container the path of the group may belong to the host and
    not exist; what does exist of it, at least the root, is still read.
    """
    limits: list[float] = []
    for line in _read(own_cgroups).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            for folder in _upwards(cgroup_root, group):
                limits += _quota(*_first_two(_read(folder / "cpu.max")))
        elif "cpu" in controllers.split(","):
            # Usual mount points of version 1: the controllers' joint name, or a link `cpu`.
            for mount in {controllers, "cpu"}:
                for folder in _upwards(cgroup_root / mount, group):
                    limits += _quota(
                        _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
                    )
    return min(limits, default=None)


def cpu_name(cpuinfo: Path = _PROC / "cpuinfo") -> str:
    """The processor's name for people, such as `AMD EPYC 9B14`; the architecture if unknown."""
    for line in _read(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    if sys.platform == "darwin":
        import subprocess

        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine()


def peak_rss_bytes(status: Path = _PROC / "self/status") -> int | None:
    """The most memory this process has had resident so far, in bytes; None if not known.

    Linux's own line is preferred to `getrusage`, whose figure survives `exec`: a small
    program started by a large one would report the large one's peak.
    """
    for line in _read(status).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS: bytes; others: KiB


def memory_bytes() -> int | None:
    """Memory of the machine in bytes; None if the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def usable_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or less by a cgroup's limit."""
    known = [n for n in (memory_bytes(), cgroup_memory_limit()) if n is not None]
    return min(known, default=None)


def cgroup_memory_limit(
    cgroup_root: Path = _CGROUP, own_cgroups: Path = _PROC / "self/cgroup"
) -> int | None:
    """Bytes that cgroups (version 1 or 2) grant this process, or None; as `cgroup_cpu_quota`."""
    limits: list[int] = []
    for line in _read(own_cgroups).splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            files = [folder / "memory.max" for folder in _upwards(cgroup_root, group)]
        elif "memory" in controllers.split(","):
            folders = _upwards(cgroup_root / "memory", group)
            files = [folder / "memory.limit_in_bytes" for folder in folders]
        else:
            continue
        limits += [int(text) for text in map(_read, files) if text.isdecimal()]
    # Version 1 says "no limit" with a number near 2^63.
    return min((n for n in limits if 0 < n < 1 << 60), default=None)


def _read(path: Path) -> str:
    """The stripped text of a file, or "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _upwards(root: Path, group: str) -> list[Path]:
    """The folder of a cgroup and of all its parents, up to `root`."""
    parts = [part for part in group.split("/") if part not in ("", ".", "..")]
    return [root.joinpath(*parts[:n]) for n in range(len(parts), -1, -1)]


def _first_two(text: str) -> tuple[str, str]:
    words = [*text.split(), "", ""]
    return words[0], words[1]


def _quota(quota: str, period: str) -> list[float]:
    """CPUs that `quota` microseconds in every `period` make; [] without a limit ("max", -1)."""
    try:
        microseconds, every = int(quota), int(period)
    except ValueError:
        return []
    return [microseconds / every] if microseconds > 0 and every > 0 else []
