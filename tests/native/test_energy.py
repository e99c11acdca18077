"""The runner's power rails, in folders laid out as the kernels of devices do it, which stand in for /sys below the runner."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from gcvit_edge.bundle import Bundle
from gcvit_edge.native import build

WINDOW = 0.6  # seconds that are timed, at least
MIN_WATTS, MAX_WATTS = 0.85, 1.15  # of what was set: this machine is busy with other things meanwhile

pytestmark = pytest.mark.skipif(
    build.missing_tools(build.host()) is not None and os.environ.get("CI") != "true", reason=build.missing_tools(build.host()) or ""
)


def write(path: Path, text: str) -> None:
    """At once, as the kernel does it: a reader sees the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(f"{text}\n")
    new.replace(path)


@contextmanager
def every(seconds: float, change: Callable[[], None]) -> Iterator[None]:
    """Calls `change` all the time meanwhile."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(seconds):
            change()

    change()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def sys_folder(tmp_path: Path) -> Path:
    """What the runner sees as /sys/class and /sys/bus."""
    for name in ("class", "bus"):
        (tmp_path / "sys" / name).mkdir(parents=True)
    return tmp_path / "sys"


def run(
    bundle: Bundle, sys_folder: Path, seconds: float = WINDOW, before: Callable[[], object] = lambda: None
) -> tuple[float, dict[str, float]]:
    """Seconds that inferences took, at least so many, and the joules of each rail. before: called when they are about to start."""
    artifact = bundle.artifact("executorch").path
    bundle.golden_input()[:1].astype("<f4").tofile(sys_folder.parent / "in.f32")
    shape = "\t".join(map(str, bundle.golden_input().shape[1:]))
    mounts = "".join(f'mount --bind "$0/{name}" /sys/{name} && ' for name in ("class", "bus"))
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    program = [*unshare, "sh", "-c", f'{mounts}exec "$@"', str(sys_folder), str(build.build_runner().executable), str(artifact), "1"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as runner:
        assert runner.stdin
        assert runner.stdout
        assert runner.stderr

        def ask(runs: int) -> dict:
            print("time", sys_folder.parent / "in.f32", 1, runs, shape, sep="\t", file=runner.stdin, flush=True)
            return json.loads(runner.stdout.readline())

        if not runner.stdout.readline():
            reason = f"needs the right to mount: {runner.stderr.read()}"
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
        fastest = min(ask(10)["ms"])
        before()
        answer = ask(max(1, int(1000 * seconds / fastest)))
        runner.stdin.close()
    return sum(answer["ms"]) / 1000, answer["joules"]


def test_nothing_to_read(pte_bundle: Bundle, sys_folder: Path) -> None:
    assert run(pte_bundle, sys_folder, 0.01)[1] == {}


def test_counters_of_x86(pte_bundle: Bundle, sys_folder: Path) -> None:
    powercap = sys_folder / "class" / "powercap"
    for folder, name in {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:1": "broken"}.items():
        write(powercap / folder / "name", name)
        write(powercap / folder / "max_energy_range_uj", "99999999")
    starts = [time.monotonic()]

    def count() -> None:
        seconds = time.monotonic() - starts[-1]
        write(powercap / "intel-rapl:0" / "energy_uj", str(int(2e6 * seconds)))
        write(powercap / "intel-rapl:0:0" / "energy_uj", str(int(99_950_000 + 5e5 * seconds) % 100_000_000))  # wraps after 0.1 s

    def restart() -> None:
        starts.append(time.monotonic())
        time.sleep(0.02)  # a count of the old start may be under way

    with every(0.001, count):
        seconds, joules = run(pte_bundle, sys_folder, 0.3, restart)
    assert set(joules) == {"package-0", "package-0/core"}
    assert MIN_WATTS * 2 < joules["package-0"] / seconds < MAX_WATTS * 2
    assert MIN_WATTS / 2 < joules["package-0/core"] / seconds < MAX_WATTS / 2


def odpm(path: Path, refresh: float) -> Callable[[], None]:
    """Writes the counts of a rail of 3 W and one of 1 W, new ones every `refresh` seconds, as Google's driver does it."""

    def count() -> None:
        now = int(1000 * (time.clock_gettime(time.CLOCK_BOOTTIME) // refresh * refresh))
        lines = [f"t={now}", f"CH0(T={now})[S4M_VDD_CPUCL0], {3000 * now}", f"CH1(T={now})[VSYS_PWR_MMWAVE], {1000 * now}"]
        write(path, "\n".join(lines))

    return count


def test_counters_of_a_phone(pte_bundle: Bundle, sys_folder: Path) -> None:
    device = sys_folder / "bus" / "iio" / "devices"
    (device / "iio:device0").mkdir(parents=True)  # some other sensor
    with every(0.002, odpm(device / "iio:device1" / "energy_value", 0.01)):
        seconds, joules = run(pte_bundle, sys_folder)
    assert set(joules) == {"S4M_VDD_CPUCL0", "VSYS_PWR_MMWAVE"}
    assert MIN_WATTS * 3 < joules["S4M_VDD_CPUCL0"] / seconds < MAX_WATTS * 3
    assert MIN_WATTS < joules["VSYS_PWR_MMWAVE"] / seconds < MAX_WATTS


def test_counts_that_are_too_rare_are_left_out(pte_bundle: Bundle, sys_folder: Path) -> None:
    """Those in the file are of another time than the inferences."""
    with every(0.002, odpm(sys_folder / "bus" / "iio" / "devices" / "iio:device0" / "energy_value", 60.0)):
        assert run(pte_bundle, sys_folder, 0.3)[1] == {}


def test_counts_that_do_not_come_are_waited_for_once(pte_bundle: Bundle, sys_folder: Path) -> None:
    write(sys_folder / "bus" / "iio" / "devices" / "iio:device0" / "energy_value", "t=1\nCH0(T=1)[S4M_VDD_CPUCL0], 1")
    started = []
    run(pte_bundle, sys_folder, 0.01, lambda: started.append(time.monotonic()))  # its warm-up has waited
    assert time.monotonic() - started[0] < 0.1


@pytest.fixture
def jetson(sys_folder: Path) -> Path:
    """The power sensor of a Jetson Orin Nano: three channels of 5 V, of which one is not connected; the folder of the chip."""
    chip = sys_folder / "class" / "hwmon" / "hwmon1"
    write(sys_folder / "class" / "hwmon" / "hwmon0" / "name", "pwmfan")
    write(chip / "name", "ina3221")
    write(chip / "in7_label", "sum of shunt voltages")
    for channel, label in enumerate(("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"), 1):
        write(chip / f"in{channel}_label", label)
        write(chip / f"in{channel}_input", "5000")
    write(chip / "curr1_input", "1000")
    write(chip / "curr2_input", "400")
    return chip


def test_sensors_of_a_jetson(pte_bundle: Bundle, sys_folder: Path, jetson: Path) -> None:
    drawn = [(time.monotonic(), 15)]

    def draw() -> None:  # 5 and 15 W in turns of 50 ms, or of more where this thread has to wait
        now = time.monotonic()
        watts = 5 if int((now - drawn[0][0]) / 0.05) % 2 else 15
        write(jetson / "curr1_input", str(200 * watts))
        drawn.append((now, watts))

    with every(0.002, draw):
        seconds, joules = run(pte_bundle, sys_folder, 1.0)
    assert set(joules) == {"VDD_IN", "VDD_CPU_GPU_CV"}
    assert joules["VDD_CPU_GPU_CV"] / seconds == pytest.approx(2, rel=0.02)
    used = sum((after - now) * watts for (now, watts), (after, _) in pairwise(drawn))
    mean = used / (drawn[-1][0] - drawn[0][0])
    assert MIN_WATTS * mean < joules["VDD_IN"] / seconds < MAX_WATTS * mean


def test_too_few_samples_are_left_out(pte_bundle: Bundle, sys_folder: Path, jetson: Path) -> None:
    assert run(pte_bundle, sys_folder, 0.03)[1] == {}
    write(jetson / "update_interval", "300")
    assert run(pte_bundle, sys_folder, WINDOW)[1] == {}


def test_a_sensor_that_fails_meanwhile_is_left_out(pte_bundle: Bundle, sys_folder: Path, jetson: Path) -> None:
    start = time.monotonic()

    def fail() -> None:
        if time.monotonic() - start > 0.3:
            (jetson / "curr1_input").unlink(missing_ok=True)

    with every(0.05, fail):
        assert set(run(pte_bundle, sys_folder, 1.0)[1]) == {"VDD_CPU_GPU_CV"}
