"""Facts of a machine, this one or a device that only has a shell: its CPU, and the features that fast INT8 arithmetic needs.

A device runs `FACTS_SCRIPT` and `parse_facts` reads what it printed; this machine is read the same way.
"""

import platform
import re
import subprocess
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gcvit_edge.cpus import default_threads

# by architecture: (flag in /proc/cpuinfo, what it is good for), slowest first
INT8_FEATURES = {
    "x86_64": (
        ("avx2", "INT8 by 16-bit multiply-add"),
        ("avx_vnni", "INT8 dot products, 256 bit"),
        ("avx512_vnni", "INT8 dot products, 512 bit"),
        ("amx_int8", "INT8 matrix products"),
    ),
    "aarch64": (("asimd", "NEON"), ("asimddp", "INT8 dot products"), ("i8mm", "INT8 matrix products")),
}

# part numbers of each implementer, for CPUs whose /proc/cpuinfo has no name. Sources: Linux, arch/arm64/include/asm/cputype.h;
# util-linux, sys-utils/lscpu-arm.c
_ARM, _HISILICON, _NVIDIA, _QUALCOMM = 0x41, 0x48, 0x4E, 0x51
_PARTS = {
    _ARM: {
        0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72", 0xD09: "Cortex-A73",
        0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78",
        0xD42: "Cortex-A78AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710", 0xD48: "Cortex-X2", 0xD49: "Neoverse-N2",
        0xD4B: "Cortex-A78C", 0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2", 0xD80: "Cortex-A520", 0xD81: "Cortex-A720",
        0xD82: "Cortex-X4",
    },
    _HISILICON: {0xD01: "TaiShan-v110", 0xD40: "Cortex-A76", 0xD41: "Cortex-A77"},
    _NVIDIA: {0x003: "Denver 2", 0x004: "Carmel"},
    _QUALCOMM: {
        0x001: "Oryon", 0x800: "Kryo-2XX-Gold", 0x801: "Kryo-2XX-Silver", 0x802: "Kryo-3XX-Gold", 0x803: "Kryo-3XX-Silver",
        0x804: "Kryo-4XX-Gold", 0x805: "Kryo-4XX-Silver",
    },
}  # fmt: skip

# for any POSIX shell, Android's and BusyBox's too; what a machine does not have stays empty
FACTS_SCRIPT = r"""
exec 2>/dev/null
echo '== uname'; uname -srm
echo '== system'; (. /etc/os-release && echo "$PRETTY_NAME") || echo "Android $(getprop ro.build.version.release)"
echo '== model'; tr -d '\0' < /proc/device-tree/model || cat /sys/class/dmi/id/product_name || getprop ro.product.model; echo
echo '== soc'; getprop ro.soc.model || cat /sys/devices/soc0/machine; echo
echo '== cpus'; (unset OMP_NUM_THREADS OMP_THREAD_LIMIT; nproc)
echo '== cpuinfo'; cat /proc/cpuinfo
echo '== meminfo'; cat /proc/meminfo
echo '== governor'; cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor
echo '== max_khz'; cat /sys/devices/system/cpu/cpu*/cpufreq/cpuinfo_max_freq
echo '== temperature'
for zone in /sys/class/thermal/thermal_zone*; do echo "$(cat $zone/temp) $(cat $zone/type)"; done
for file in /sys/class/hwmon/hwmon*/temp*_input; do echo "$(cat $file) $(cat ${file%/*}/name)"; done
:
"""


class Machine(BaseModel):
    """What was read of a machine; None or empty where it does not say.

    model: of the board, phone or host. soc: system on chip. cpu: name, with counts where there are several kinds of core.
    architecture: as `uname -m` has it. features: of `INT8_FEATURES`, those present. cpus: that processes may use. governor: cpufreq's,
    all that occur. max_mhz: highest clock of any CPU. memory_mb: 10^6 bytes. temperatures_c: highest of each sensor name.
    accelerator: what computes, where it is not the CPU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None
    soc: str | None
    cpu: str
    architecture: str
    features: tuple[str, ...]
    cpus: int
    governor: str | None
    max_mhz: float | None
    memory_mb: float | None
    temperatures_c: dict[str, float]
    system: str | None
    kernel: str
    accelerator: str | None = None

    @property
    def title(self) -> str:
        """One line for people."""
        where = f"{self.model}: " if self.model else ""
        hottest = f", {max(self.temperatures_c.values()):.0f} °C" if self.temperatures_c else ""
        return f"{where}{self.accelerator or self.cpu}, {self.cpus} CPUs ({', '.join(self.features) or self.architecture}){hottest}"


def parse_facts(text: str) -> Machine:
    """The machine on which `FACTS_SCRIPT` printed `text`."""
    sections = {name: body.strip() for name, body in re.findall(r"^== (\w+)\n(.*?)(?=^== |\Z)", text, re.MULTILINE | re.DOTALL)}
    kernel, _, architecture = sections.get("uname", "").rpartition(" ")
    cpuinfo = sections.get("cpuinfo", "")
    flags = _flags(cpuinfo)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", sections.get("meminfo", ""), re.MULTILINE)
    clocks = [int(line) for line in sections.get("max_khz", "").split()]
    return Machine(
        model=_words(sections.get("model", "")),
        soc=_words(sections.get("soc", "")),
        cpu=_cpu_name(cpuinfo) or architecture,
        architecture=architecture,
        features=tuple(flag for flag, _ in INT8_FEATURES.get(architecture, ()) if flag in flags),
        cpus=int(sections.get("cpus") or len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE)) or 1),
        governor=", ".join(sorted(set(sections.get("governor", "").split()))) or None,
        max_mhz=max(clocks) / 1000 if clocks else None,
        memory_mb=round(int(memory.group(1)) * 1024 / 1e6, 1) if memory else None,
        temperatures_c=_temperatures(sections.get("temperature", "")),
        system=_words(sections.get("system", "")),
        kernel=kernel,
    )


def _words(text: str) -> str | None:
    return " ".join(text.split()) if text.strip() not in ("", "Android") else None


def _flags(cpuinfo: str) -> set[str]:
    line = re.search(r"^(?:flags|Features)\s*:(.*)", cpuinfo, re.MULTILINE)
    return set(line.group(1).split()) if line else set()


def _cpu_name(cpuinfo: str) -> str | None:
    name = re.search(r"^model name\s*:\s*(.+)", cpuinfo, re.MULTILINE)
    if name:
        return name.group(1).strip()
    cpus = re.findall(r"^CPU implementer\s*:\s*(0x\w+)$.*?^CPU part\s*:\s*(0x\w+)$", cpuinfo, re.MULTILINE | re.DOTALL)
    kinds = Counter((int(implementer, 16), int(part, 16)) for implementer, part in cpus)
    names = [
        f"{count}x {_PARTS.get(implementer, {}).get(part, f'Arm part {part:#x}')}" for (implementer, part), count in sorted(kinds.items())
    ]
    return " + ".join(names) or None


def _temperatures(text: str) -> dict[str, float]:
    """Linux gives thousandths of a degree; some Android zones give whole ones, and unused zones nonsense."""
    highest: dict[str, float] = {}
    for line in text.splitlines():
        value, _, name = line.strip().partition(" ")
        if not re.fullmatch(r"-?\d+", value) or not name:
            continue
        degrees = int(value) / 1000 if abs(int(value)) >= 1000 else float(value)
        if 0 < degrees < 150:
            highest[name] = max(highest.get(name, 0.0), degrees)
    return highest


def this_machine() -> Machine:
    """Facts of this machine, whose CPUs are those that this process may use."""
    done = subprocess.run(["sh", "-c", FACTS_SCRIPT], capture_output=True, text=True, errors="replace", check=False)
    return parse_facts(done.stdout).model_copy(update={"cpus": default_threads()})


def cpu_name() -> str:
    """The name of this machine's CPU for a reader."""
    return this_machine().cpu


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has instructions for products in bfloat16 (AVX512-BF16, AMX, ARM's BF16); False where the system does not say."""
    with suppress(OSError):
        return bool(_flags(cpuinfo.read_text()) & {"avx512_bf16", "amx_bf16", "bf16"})
    return False


def int8_features() -> list[tuple[str, str, bool]]:
    """(flag, meaning, present) of the INT8 features of this architecture."""
    present = this_machine().features
    return [(flag, meaning, flag in present) for flag, meaning in INT8_FEATURES.get(platform.machine(), ())]


def without_int8_products(backends: Collection[str]) -> str | None:
    """What to say of INT8 in these backends on this CPU if it has no instructions that add up products of bytes, as all of `INT8_FEATURES`
    but the first of each architecture are; None if it has."""
    if any(present for _, _, present in int8_features()[1:]):
        return None
    text = "This CPU has no INT8 dot product instructions that we know of, so INT8 gains less here than elsewhere"
    x86 = "; in OpenVINO linears are slower than float's unless the recipe has `x86: avx2`, as int8_ptq_avx2 has"
    return f"{text}{x86 if platform.machine() == 'x86_64' and 'openvino' in backends else ''}."
