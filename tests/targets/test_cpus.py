"""CPUs to time on, from what devices print."""

import os
import subprocess
from pathlib import Path

from gcvit_edge.targets._cpus import CPUS_SCRIPT, fastest_first, fastest_here

PHONE = "0-7\n" + "".join(f"{cpu} {khz} {cpu}\n" for cpu, khz in enumerate([1800000] * 4 + [2400000] * 3 + [3000000]))


def test_the_big_cores_of_a_phone() -> None:
    assert fastest_first(PHONE) == [7, 4, 5, 6, 0, 1, 2, 3]


def test_only_those_that_may_be_used() -> None:
    assert fastest_first(PHONE.replace("0-7", "0-3,5")) == [5, 0, 1, 2, 3]


def test_siblings_of_a_core_come_last() -> None:
    assert fastest_first("0-3\n0 0 0,2\n1 0 1,3\n2 0 0,2\n3 0 1,3\n") == [0, 1, 2, 3]
    assert fastest_first("0-3\n0 0 0-1\n1 0 0-1\n2 0 2-3\n3 0 2-3\n") == [0, 2, 1, 3]


def test_a_device_that_does_not_say() -> None:
    assert fastest_first("") == []
    assert fastest_first("0-1\n10 0 \n1 0 \n0 0 \n") == [0, 1]


def test_this_machine() -> None:
    assert sorted(fastest_here()) == sorted(os.sched_getaffinity(0))


def test_what_the_script_prints(tmp_path: Path) -> None:
    """Of a kernel that has no folder of CPUs, and of one with a slow CPU, a fast one and one that is off."""

    def printed() -> str:
        script = CPUS_SCRIPT.replace("/sys/devices/system/cpu", f"{tmp_path}/cpu")
        return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout

    assert fastest_first(printed()) == []
    for cpu, khz in enumerate((1800000, 2400000, 0)):
        (tmp_path / f"cpu/cpu{cpu}/cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq").write_text(f"{khz}\n")
        (tmp_path / f"cpu/cpu{cpu}/online").write_text("1\n" if khz else "0\n")
    assert printed().splitlines()[1:] == ["0 1800000 ", "1 2400000 "]
