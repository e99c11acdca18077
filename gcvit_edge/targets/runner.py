"""The native runner on this machine: what a program without Python gets from a .pte."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.cpus import default_threads, fastest_here
from gcvit_edge.native.build import RunnerFiles, build_runner, host, missing_tools
from gcvit_edge.targets import Case, Connection
from gcvit_edge.targets._process import ETDUMP, LocalFolder, ProcessSession, profile_file
from gcvit_edge.targets._process import runner_cases as cases

if TYPE_CHECKING:
    from gcvit_edge.measurement.machine import Machine

__all__ = ["ADDRESS", "HELP", "MEASURES_TIME", "Options", "cases", "connect", "missing"]

HELP = "this machine's CPU by the native C++ runner, built on demand; runs executorch"
ADDRESS = "none"
MEASURES_TIME = True


@dataclass(frozen=True)
class Options:
    """etdump: see its help."""

    etdump: Path | None = field(default=None, metadata=ETDUMP)


def missing(address: str) -> str | None:
    return missing_tools(host())


@contextmanager
def connect(address: str, options: Options) -> Iterator[Connection]:
    yield NativeRunner(build_runner(), options)


class NativeRunner(Connection):
    """This machine, running .pte files by the runner."""

    def __init__(self, files: RunnerFiles, options: Options) -> None:
        self._files, self._options = files, options
        self.side_by_side = default_threads()

    def machine(self) -> "Machine":
        from gcvit_edge.measurement.machine import this_machine

        return this_machine()

    def open(self, case: Case, threads: int, *, pinned: bool) -> ProcessSession:
        command = [str(self._files.executable), str(case.artifact.path.resolve()), str(threads)]
        cpus = fastest_here() if pinned else []
        if threads < len(cpus):
            command += ["--cpus", ",".join(map(str, cpus[:threads]))]
        if self._options.etdump is not None and pinned:
            command += ["--etdump", str(profile_file(self._options.etdump, case.artifact))]
        return ProcessSession(case.artifact, command, LocalFolder())
