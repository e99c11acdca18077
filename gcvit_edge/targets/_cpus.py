"""Which CPUs of a device, or of this machine, to time on, where some are faster than others: a phone's big cores first."""

import subprocess
from collections import Counter

# for any POSIX shell: the CPUs that it may use, then of every one that is on its number, highest clock in kHz and the CPUs of its core
CPUS_SCRIPT = r"""
exec 2>/dev/null
sed -n 's/^Cpus_allowed_list:[^0-9]*//p' /proc/self/status
cd /sys/devices/system/cpu || exit 0
for cpu in cpu[0-9]*; do
    [ "$(cat $cpu/online)" = 0 ] && continue
    khz=$(cat $cpu/cpufreq/cpuinfo_max_freq)
    echo "${cpu#cpu} ${khz:-0} $(cat $cpu/topology/thread_siblings_list)"
done
:
"""


def fastest_first(text: str) -> list[int]:
    """The CPUs in what `CPUS_SCRIPT` printed: one a core as far as they go, of those the fastest first; none if it says nothing."""
    first, *lines = text.splitlines() or [""]
    allowed = {number for span in first.split(",") if span for number in _span(span)}
    taken: Counter[str] = Counter()
    ranked = []
    for number, khz, *siblings in sorted((line.split() for line in lines), key=lambda words: int(words[0])):
        if int(number) in allowed:
            core = " ".join(siblings) or number
            ranked.append((taken[core], -int(khz), int(number)))
            taken[core] += 1
    return [number for _, _, number in sorted(ranked)]


def fastest_here() -> list[int]:
    """`fastest_first` of this machine: those that this process may use."""
    return fastest_first(subprocess.run(["sh", "-c", CPUS_SCRIPT], capture_output=True, text=True, check=False).stdout)


def _span(text: str) -> range:
    low, _, high = text.partition("-")
    return range(int(low), int(high or low) + 1)
