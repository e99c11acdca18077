"""CPUs to time on, from what devices print."""

import os
import subprocess
from pathlib import Path

import pytest

from gcvit_edge.cpus import CPUS_SCRIPT, cpu_quota, default_threads, fastest_first, fastest_here, resolve_threads
from gcvit_edge.errors import UserError

PHONE = "0-7\n" + "".join(f"{cpu} 0 {khz} {cpu}\n" for cpu, khz in enumerate([1800000] * 4 + [2400000] * 3 + [3000000]))


def test_the_big_cores_of_a_phone() -> None:
    assert fastest_first(PHONE) == [7, 4, 5, 6, 0, 1, 2, 3]


def test_little_cores_with_the_higher_clock() -> None:
    """As of Amlogic's S922X: two Cortex-A53 at up to 1.9 GHz, four Cortex-A73 at up to 1.7 GHz."""
    cores = [(592, 1896000)] * 2 + [(1024, 1704000)] * 4
    assert fastest_first("0-5\n" + "".join(f"{cpu} {size} {khz} {cpu}\n" for cpu, (size, khz) in enumerate(cores))) == [2, 3, 4, 5, 0, 1]


def test_only_those_that_may_be_used() -> None:
    assert fastest_first(PHONE.replace("0-7", "0-3,5")) == [5, 0, 1, 2, 3]


def test_siblings_of_a_core_come_last() -> None:
    assert fastest_first("0-3\n0 0 0 0,2\n1 0 0 1,3\n2 0 0 0,2\n3 0 0 1,3\n") == [0, 1, 2, 3]
    assert fastest_first("0-3\n0 0 0 0-1\n1 0 0 0-1\n2 0 0 2-3\n3 0 0 2-3\n") == [0, 2, 1, 3]


def test_a_device_that_does_not_say() -> None:
    assert fastest_first("") == []
    assert fastest_first("0-1\n") == []
    assert fastest_first(PHONE.partition("\n")[2]) == []
    assert fastest_first("0-1\n10 0 0 \n1 0 0 \n0 0 0 \n") == [0, 1]


def test_this_machine() -> None:
    assert sorted(fastest_here()) == sorted(os.sched_getaffinity(0))


def test_what_the_script_prints(tmp_path: Path) -> None:
    """Of a kernel that has no folder of CPUs, of one with none in it, and of one with a slow CPU, a fast one and one that is off."""

    def printed() -> str:
        script = CPUS_SCRIPT.replace("/sys/devices/system/cpu", f"{tmp_path}/cpu")
        return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout

    assert fastest_first(printed()) == []
    (tmp_path / "cpu/cpufreq").mkdir(parents=True)
    assert len(printed().splitlines()) == 1
    assert fastest_first(printed()) == []
    for cpu, khz in enumerate((1800000, 2400000, 0)):
        (tmp_path / f"cpu/cpu{cpu}/cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq").write_text(f"{khz}\n")
        (tmp_path / f"cpu/cpu{cpu}/online").write_text("1\n" if khz else "0\n")
    (tmp_path / "cpu/cpu1/cpu_capacity").write_text("1024\n")
    assert printed().splitlines()[1:] == ["0 0 1800000 ", "1 1024 2400000 "]


# how many


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n", "a/b/cpu.max": "400000 100000\n"}, 2),
        ("4:memory:/a\n3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "400000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 4),
        ("3:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_quota_of_a_container(own: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert cpu_quota(groups, tmp_path / "own") == quota


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "own") is None


def test_threads() -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))
    cpus = default_threads()
    assert (resolve_threads(None), resolve_threads(1), resolve_threads(cpus)) == (cpus, 1, cpus)
    with pytest.raises(UserError, match="threads must be at least 1, got 0"):
        resolve_threads(0)
    with pytest.raises(UserError, match=f"threads must be at most the {cpus} CPUs that this process may use, got {cpus + 1}"):
        resolve_threads(cpus + 1)
