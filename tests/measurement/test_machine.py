"""Facts of a machine, read from what a shell prints on very different ones."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from gcvit_edge.measurement.machine import FACTS_SCRIPT, Machine, has_bfloat16, parse_facts, this_machine, without_int8_products

PI5 = """
== uname
Linux 6.6.31+rpt-rpi-2712 aarch64
== system
Debian GNU/Linux 12 (bookworm)
== model
Raspberry Pi 5 Model B Rev 1.0
== soc

== cpuinfo
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

processor\t: 1
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

Model\t\t: Raspberry Pi 5 Model B Rev 1.0
== meminfo
MemTotal:        8245248 kB
MemFree:         5063936 kB
== governor
ondemand
ondemand
== max_khz
2400000
2400000
== temperature
61200 cpu-thermal
62300 cpu_thermal
 thermal_zone*
"""

PHONE = """
== uname
Linux 5.10.149-android13 aarch64
== system
Android 13
== model
Pixel 7
== soc
GS201
== cpuinfo
processor\t: 0
Features\t: fp asimd asimddp i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd05
processor\t: 1
CPU implementer\t: 0x41
CPU part\t: 0xd44
processor\t: 2
CPU implementer\t: 0x41
CPU part\t: 0xfff
== meminfo
MemTotal:        7731936 kB
== governor
sched_pixel
powersave
== max_khz
1803000
2850000
== temperature
38 battery
41000 BIG
-274000 unused
1000000 broken
"""


def test_raspberry_pi() -> None:
    assert parse_facts(PI5) == Machine(
        model="Raspberry Pi 5 Model B Rev 1.0", soc=None, cpu="2x Cortex-A76", architecture="aarch64", features=("asimd", "asimddp"),
        cpus=2, governor="ondemand", max_mhz=2400, memory_mb=8443.1, temperatures_c={"cpu-thermal": 61.2, "cpu_thermal": 62.3},
        system="Debian GNU/Linux 12 (bookworm)", kernel="Linux 6.6.31+rpt-rpi-2712",
    )  # fmt: skip
    assert parse_facts(PI5).title == "Raspberry Pi 5 Model B Rev 1.0: 2x Cortex-A76, 2 CPUs (asimd, asimddp), 62 °C"


def test_cpus_are_those_that_may_be_used() -> None:
    assert parse_facts(f"{PI5}\n== cpus\n1\n").cpus == 1
    allowed = sorted(os.sched_getaffinity(0))
    for pinned, cpus in ((["taskset", "-c", str(allowed[-1])], 1), ([], len(allowed))):
        environment = os.environ | {"OMP_NUM_THREADS": "1000"}  # which nproc would say
        printed = subprocess.run([*pinned, "sh", "-c", FACTS_SCRIPT], capture_output=True, text=True, check=True, env=environment)
        assert parse_facts(printed.stdout).cpus == cpus


def test_phone_with_several_kinds_of_core() -> None:
    phone = parse_facts(PHONE)
    assert phone.cpu == "1x Cortex-A55 + 1x Cortex-X1 + 1x Arm part 0xfff"
    assert (phone.soc, phone.system, phone.governor, phone.max_mhz) == ("GS201", "Android 13", "powersave, sched_pixel", 2850)
    assert phone.features == ("asimd", "asimddp", "i8mm")
    assert phone.temperatures_c == {"battery": 38, "BIG": 41}


@pytest.mark.parametrize(
    ("cpus", "name"),
    [
        ((("0x41", "0xd05"), ("0x48", "0xd40"), ("0x48", "0xd40")), "1x Cortex-A55 + 2x Cortex-A76"),  # Kirin 980
        ((("0x41", "0xd40"),), "1x Neoverse-V1"),
        ((("0x48", "0xd01"),), "1x TaiShan-v110"),
        ((("0x48", "0xd0c"),), "1x Arm part 0xd0c"),
        ((("0x51", "0xd05"), ("0x61", "0x022")), "1x Arm part 0xd05 + 1x Arm part 0x22"),
        ((("0x51", "0x805"), ("0x51", "0x805"), ("0x41", "0xd0d")), "1x Cortex-A77 + 2x Kryo-4XX-Silver"),
        ((("0x4e", "0x004"),), "1x Carmel"),
    ],
)
def test_a_part_number_is_its_implementer_s(cpus: tuple[tuple[str, str], ...], name: str) -> None:
    entries = [
        f"processor\t: {number}\nCPU implementer\t: {implementer}\nCPU variant\t: 0x1\nCPU part\t: {part}\nCPU revision\t: 0\n"
        for number, (implementer, part) in enumerate(cpus)
    ]
    assert parse_facts("== uname\nLinux 4.14 aarch64\n== cpuinfo\n" + "\n".join(entries)).cpu == name


@pytest.mark.parametrize("text", ["", "== uname\n\n== cpuinfo\n"])
def test_what_a_machine_does_not_say_is_absent(text: str) -> None:
    machine = parse_facts(text)
    assert (machine.model, machine.governor, machine.max_mhz, machine.memory_mb, machine.system) == (None,) * 5
    assert machine.temperatures_c == {}
    assert machine.cpus == 1


@pytest.mark.parametrize(
    ("architecture", "features", "said"),
    [
        ("x86_64", (), "int8_ptq_avx2 has."), ("x86_64", ("avx2",), "int8_ptq_avx2 has."), ("x86_64", ("avx2", "avx_vnni"), None),
        ("aarch64", ("asimd",), "than elsewhere."), ("aarch64", ("asimd", "asimddp"), None),
    ],
)  # fmt: skip
def test_int8_products(architecture: str, features: tuple[str, ...], said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = this_machine().model_copy(update={"features": features})
    monkeypatch.setattr("gcvit_edge.measurement.machine.this_machine", lambda: machine)
    monkeypatch.setattr("platform.machine", lambda: architecture)
    found = without_int8_products(["onnx", "openvino"])
    assert (found is None) if said is None else (found or "").endswith(said)
    elsewhere = without_int8_products(["onnx"])
    assert (elsewhere is None) if said is None else (elsewhere or "").endswith("than elsewhere.")


def test_this_machine() -> None:
    machine = this_machine()
    assert machine.architecture == platform.machine()
    assert machine.kernel == f"{platform.system()} {platform.release()}"
    assert machine.cpu
    assert machine.memory_mb is not None
    assert machine.memory_mb > 100


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False), ("flags\t\t: fpu avx512_bf16", True), ("flags\t\t: amx_bf16 amx_tile", True),
        ("Features\t: fp asimd asimddp", False), ("Features\t: fp asimd i8mm bf16", True), ("", False), (None, False),
    ],
)  # fmt: skip
def test_bfloat16(cpuinfo: str | None, has: bool, tmp_path: Path) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert has_bfloat16(tmp_path / "cpuinfo") is has
