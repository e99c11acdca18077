"""64-bit ARM by emulation on this machine: whether ARM's kernels give the right answers, and what an inference costs in instructions.

The runner is built for ARM and run by QEMU's user mode emulation, whose time says nothing of a device.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.cpus import default_threads
from gcvit_edge.errors import CheckFailed, UserError, unknown_name
from gcvit_edge.native.build import RunnerFiles, build_counter, build_runner, missing_tools
from gcvit_edge.targets import Case, Connection
from gcvit_edge.targets._process import LocalFolder, ProcessSession
from gcvit_edge.targets._process import runner_cases as cases

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gcvit_edge.artifact import Artifact
    from gcvit_edge.measurement.machine import Machine

__all__ = ["ADDRESS", "HELP", "MEASURES_TIME", "Options", "cases", "connect", "missing"]

HELP = "64-bit ARM emulated by QEMU: right or wrong answers and instruction counts, no times; runs executorch"
ADDRESS = "none"
MEASURES_TIME = False

_QEMU = "qemu-aarch64"
_SYSROOT = Path("/usr/aarch64-linux-gnu")  # where Debian's cross packages put ARM's libc and libstdc++


_CPUS = {  # as QEMU's option -cpu has them: of `machine.INT8_FEATURES`, those that each has
    "cortex-a53": ("asimd",),
    "cortex-a76": ("asimd", "asimddp"),
    "max": ("asimd", "asimddp", "i8mm"),
}
_SME = (7, 1)  # QEMU that brought it, and the property that switches it off


def qemu_cpu(cpu: str, version: str) -> str:
    """A key of `_CPUS` as the option -cpu of this version of QEMU has it: with SME, QEMU 7.2 computes INT8 wrongly and says nothing."""
    has_sme = tuple(map(int, re.findall(r"\d+", version)[:2])) >= _SME
    return f"{cpu},sme=off" if cpu == "max" and has_sme else cpu


@dataclass(frozen=True)
class Options:
    """cpu: a key of `_CPUS`. count: whether sessions count instructions."""

    cpu: str = field(default="cortex-a76", metadata={"help": f"emulated CPU: {', '.join(_CPUS)} (default: cortex-a76)"})
    count: bool = field(
        default=False, metadata={"help": "count instructions of one inference on one thread: all, SDOT, SMMLA, FMLA", "benchmark": True}
    )


def missing(address: str) -> str | None:
    lacks = missing_tools("aarch64")
    if lacks is None and shutil.which(_QEMU) is None:
        return "emulation needs: apt install qemu-user"
    if lacks is None and not (_SYSROOT / "lib" / "ld-linux-aarch64.so.1").exists():
        return "emulation needs ARM's C library: apt install libc6-arm64-cross libstdc++6-arm64-cross"
    return lacks


@contextmanager
def connect(address: str, options: Options) -> Iterator[Connection]:
    if options.cpu not in _CPUS:
        raise unknown_name("emulated CPU", options.cpu, _CPUS)
    version = subprocess.run([_QEMU, "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    if options.count and not 6 <= int(version.partition(".")[0]) <= 8:
        raise UserError(f"--count needs QEMU 6 to 8, whose plugin interface it uses; {_QEMU} here is {version}")
    yield Emulation(build_runner("aarch64"), options.cpu, version, build_counter() if options.count else None)


class Emulation(Connection):
    """An emulated CPU. counter: the plugin, or None to count nothing."""

    def __init__(self, files: RunnerFiles, cpu: str, version: str, counter: Path | None) -> None:
        self._files, self._cpu, self._version, self._counter = files, cpu, version, counter
        self.side_by_side = default_threads()

    def machine(self) -> "Machine":
        from gcvit_edge.measurement.machine import this_machine

        host = this_machine()
        changes = {
            "model": None, "soc": None, "cpu": f"{self._cpu} of QEMU {self._version}", "architecture": "aarch64",
            "features": _CPUS[self._cpu], "governor": None, "max_mhz": None, "temperatures_c": {},
        }  # fmt: skip
        return host.model_copy(update=changes)

    def open(self, case: Case, threads: int, *, pinned: bool) -> ProcessSession:
        emulator = [_QEMU, "-L", str(_SYSROOT), "-cpu", qemu_cpu(self._cpu, self._version)]
        program = [str(self._files.executable), str(case.artifact.path.resolve())]
        if self._counter is None:
            return ProcessSession(case.artifact, [*emulator, *program, str(threads)], LocalFolder())
        return CountingSession(case.artifact, emulator, program, threads, self._counter)


class CountingSession(ProcessSession):
    """A session that can count the instructions of an inference, in processes of one thread made for that."""

    def __init__(self, artifact: "Artifact", emulator: Sequence[str], program: Sequence[str], threads: int, counter: Path) -> None:
        """emulator, program: the two parts of the command, without the number of threads. counter: the plugin."""
        self._emulator, self._program, self._counter = emulator, program, counter
        self._counted = LocalFolder()
        super().__init__(artifact, [*emulator, *program, str(threads)], LocalFolder())

    def counts(self, image: "NDArray[np.float32]") -> dict[str, float]:
        """Instructions of one inference after the first, by name: the difference of processes that make two and one."""
        once, twice = (self._count(image, runs) for runs in (1, 2))
        return {name: twice[name] - once[name] for name in twice}

    def close(self) -> None:
        super().close()
        self._counted.remove()

    def _count(self, image: "NDArray[np.float32]", runs: int) -> dict[str, float]:
        """Instructions of a whole process that makes `runs` inferences."""
        counter, out = (str(path).replace(",", ",,") for path in (self._counter, self._counted.path("counts")))
        plugin = ["-plugin", f"{counter},out={out}"]
        time = "\t".join(map(str, ("time", self._put(image), 0, runs, *image.shape[1:])))
        command = [*self._emulator, *plugin, *self._program, "1"]
        done = subprocess.run(command, input=f"{time}\n", capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0:
            raise CheckFailed(f"{self.artifact.path.name} does not run under the counter of instructions:\n{done.stderr[-2000:]}")
        lines = self._counted.get("counts").decode().splitlines()
        return {name: float(count) for name, count in (line.split() for line in lines)}
