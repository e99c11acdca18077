"""This machine: its CPU, and the features that fast INT8 arithmetic needs."""

import platform
from pathlib import Path

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


def cpu_flags() -> set[str]:
    """CPU feature flags, as Linux names them; empty where they cannot be read."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    lines = [line for line in path.read_text().splitlines() if line.startswith(("flags", "Features"))]
    return set(lines[0].split(":")[1].split()) if lines else set()


def cpu_name() -> str:
    """The CPU's name for a reader."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def int8_features() -> list[tuple[str, str, bool]]:
    """(flag, meaning, present) of the INT8 features of this architecture."""
    flags = cpu_flags()
    return [(flag, meaning, flag in flags) for flag, meaning in INT8_FEATURES.get(platform.machine(), ())]
