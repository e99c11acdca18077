"""CPUs: how many this process may use, and which of a device's to time on, where some are faster than others: a phone's big cores first."""

import os
import re
import subprocess
from collections import Counter
from contextlib import suppress
from math import ceil
from pathlib import Path

from gcvit_edge.errors import UserError

# for any POSIX shell: the CPUs that it may use, then of every one that is on its number, capacity (what ARM's kernels say of its speed; the
# little cores of some boards have the higher clock), highest clock in kHz and the CPUs of its core
CPUS_SCRIPT = r"""
exec 2>/dev/null
sed -n 's/^Cpus_allowed_list:[^0-9]*//p' /proc/self/status
cd /sys/devices/system/cpu || exit 0
for cpu in cpu[0-9]*; do
    [ -d $cpu ] || continue
    [ "$(cat $cpu/online)" = 0 ] && continue
    capacity=$(cat $cpu/cpu_capacity)
    khz=$(cat $cpu/cpufreq/cpuinfo_max_freq)
    echo "${cpu#cpu} ${capacity:-0} ${khz:-0} $(cat $cpu/topology/thread_siblings_list)"
done
:
"""


def fastest_first(text: str) -> list[int]:
    """The CPUs in what `CPUS_SCRIPT` printed: one a core as far as they go, of those the fastest first; none if it says nothing."""
    first, *lines = text.splitlines() or [""]
    if not re.fullmatch(r"[\d,-]+", first):  # of a kernel that does not say which may be used, the line of a CPU
        return []
    allowed = {number for span in first.split(",") for number in _span(span)}
    taken: Counter[str] = Counter()
    ranked = []
    for number, capacity, khz, *siblings in sorted((line.split() for line in lines), key=lambda words: int(words[0])):
        if int(number) in allowed:
            core = " ".join(siblings) or number
            ranked.append((taken[core], -int(capacity), -int(khz), int(number)))
            taken[core] += 1
    return [number for *_, number in sorted(ranked)]


def fastest_here() -> list[int]:
    """`fastest_first` of this machine: those that this process may use."""
    return fastest_first(subprocess.run(["sh", "-c", CPUS_SCRIPT], capture_output=True, text=True, check=False).stdout)


def default_threads() -> int:
    """CPUs that this process may use, by its mask and by the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, ceil(cpu_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")) or allowed)))


def resolve_threads(threads: int | None) -> int:
    """CPU threads to time with: as given, or one for each CPU that this process may use.

    Raises:
        UserError: fewer than one, or more than there are CPUs, which would wait for one another.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    cpus = default_threads()
    if threads is not None and threads > cpus:
        raise UserError(f"threads must be at most the {cpus} CPUs that this process may use, got {threads}")
    return threads or cpus


def cpu_quota(groups: Path, own: Path) -> float | None:
    """CPUs that a control group, or one above it, lets a process take on average; None without a limit.

    groups: where control groups are mounted. own: the file that names those of the process.
    Source: Linux kernel documentation, "Control Group v2" (cpu.max) and "CFS Bandwidth Control" (version 1).
    """
    limits = []
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = groups / ("cpu" if controllers else "")
            group = root / name.lstrip("/")
            for folder in (group, *group.parents):
                limits += _quota(folder)
                if folder == root:
                    break
    return min(limits, default=None)


def _quota(folder: Path) -> list[float]:
    """Of one control group: quota by period, if it has one."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()  # "max 100000" without a limit
        return [int(quota) / int(period)]
    with suppress(OSError, ValueError):
        quota, period = ((folder / f"cpu.cfs_{each}_us").read_text() for each in ("quota", "period"))
        return [int(quota) / int(period)] if int(quota) > 0 else []
    return []


def _span(text: str) -> range:
    low, _, high = text.partition("-")
    return range(int(low), int(high or low) + 1)
