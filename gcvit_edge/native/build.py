"""Builds the native programs on demand, and keeps them in the cache of this user: `build_runner(architecture)` gives its files.

The runner is built against the headers and libraries of the ExecuTorch wheel of the architecture: the installed one, or one that
pip downloads once. A build is named after everything that decides it (sources, ExecuTorch, compiler), so nothing goes stale.
"""

import errno
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from gcvit_edge.errors import CheckFailed, UserError, unknown_name
from gcvit_edge.paths import is_full

RUNNER = "gcvit-edge-runner"
_SOURCES = Path(__file__).parent
_DAY = 86_400  # seconds; no build takes as long
_CMAKE_VARIABLES = ("CC", "CXX", "LDFLAGS", "CMAKE_")  # how environment variables begin that it reads


@dataclass(frozen=True)
class Toolchain:
    """compiler: its command. packages: Debian's, that have it. cmake: options. wheel: pip's platform, where another machine's
    wheel of ExecuTorch is needed."""

    compiler: str
    packages: str
    cmake: tuple[str, ...] = ()
    wheel: str | None = None


_CROSS = Toolchain(
    "aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu", (f"-DCMAKE_TOOLCHAIN_FILE={_SOURCES / 'aarch64.cmake'}",), "manylinux_2_28_aarch64"
)
_NATIVE = Toolchain("c++", "g++")


@dataclass(frozen=True)
class RunnerFiles:
    """A built runner. executable: runs FILE.pte, see runner.cpp. libraries: all that it needs besides glibc and libstdc++; it
    looks for them in its own folder and in `lib` in it."""

    executable: Path
    libraries: tuple[Path, ...]


def host() -> str:
    """Architecture of this machine, as `uname -m` has it."""
    return platform.machine()


def architectures() -> list[str]:
    """Those that the runner can be built for here."""
    return sorted({host(), "aarch64"})


def missing_tools(architecture: str) -> str | None:
    """What building for `architecture` lacks here and how to install it; None if nothing is missing.

    Raises:
        UserError: unknown architecture.
    """
    toolchain = _toolchain(architecture)
    try:
        compiler = _compiler(toolchain)[0]
    except UserError as error:
        return str(error)
    if compiler != toolchain.compiler and shutil.which(compiler) is None:
        return f"building the runner needs a C++ compiler, but CXX names {compiler}, which is not there; install it, or unset CXX"
    return missing_programs({"cmake": "cmake", "make": "make", compiler: toolchain.packages})


def missing_programs(packages: dict[str, str]) -> str | None:
    """As `missing_tools`, for programs and Debian's packages that have them; every build needs ExecuTorch besides."""
    lacking = [package for program, package in packages.items() if shutil.which(program) is None]
    if lacking:
        return f"building the runner needs: apt install {' '.join(lacking)}"
    try:
        executorch_version()
    except UserError as error:
        return str(error)
    return None


def executorch_version() -> str:
    """That of the installed ExecuTorch.

    Raises:
        UserError: it is not installed.
    """
    try:
        return version("executorch")
    except PackageNotFoundError:
        raise UserError("building the runner needs the package executorch, which is not installed: pip install executorch") from None


def build_runner(architecture: str | None = None) -> RunnerFiles:
    """The runner for `architecture` ("x86_64", "aarch64"; None is this machine), from the cache if it was built before.

    Raises:
        UserError: unknown architecture, a tool or ExecuTorch is missing, its wheel cannot be downloaded, or the build fails.
    """
    architecture = architecture or host()
    toolchain = _toolchain(architecture)
    lacks = missing_tools(architecture)
    if lacks:
        raise UserError(lacks)
    executorch = executorch_package(architecture)
    options = [f"-DCMAKE_PREFIX_PATH={executorch}", *toolchain.cmake]
    libraries = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in sorted((executorch / "lib").glob("*"))]
    return compile_runner(architecture, options, [executorch_version(), str(executorch), *libraries, _identity(_compiler(toolchain))])


def compile_runner(name: str, options: Sequence[str], decided_by: Sequence[str]) -> RunnerFiles:
    """The runner as CMake builds it with these options, kept as `name`. decided_by: what decides it besides our sources.

    Raises:
        UserError: the build fails.
    """

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="gcvit-edge-") as work:
            configure = ["cmake", "-G", "Unix Makefiles", "-S", str(_SOURCES), "-B", work, "-DCMAKE_BUILD_TYPE=Release", *options]
            _run(configure, "configure the runner")
            _run(["cmake", "--build", work], "compile the runner")
            _run(["cmake", "--install", work, "--prefix", str(folder)], "install the runner")

    sources = _texts(("runner.cpp", "energy.h", "CMakeLists.txt", "aarch64.cmake"))
    read_by_cmake = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_CMAKE_VARIABLES)]
    built = _kept(f"runner-{name}", [*sources, *decided_by, *read_by_cmake], build)
    return RunnerFiles(built / RUNNER, tuple(sorted((built / "lib").glob("*.so"))))


def build_counter() -> Path:
    """The QEMU plugin that counts instructions, a shared library for this machine.

    Raises:
        UserError: no C compiler, or the build fails.
    """
    if shutil.which("cc") is None:
        raise UserError("counting instructions needs a C compiler: apt install gcc")

    def build(folder: Path) -> None:
        folder.mkdir()
        _run(["cc", "-shared", "-fPIC", "-O2", "-o", str(folder / "count.so"), str(_SOURCES / "count.c")], "compile the counter")

    return _kept("counter", [*_texts(["count.c"]), _identity(["cc"])], build) / "count.so"


def _toolchain(architecture: str) -> Toolchain:
    if architecture not in architectures():
        raise unknown_name("architecture", architecture, architectures())
    return _NATIVE if architecture == host() else _CROSS


def _compiler(toolchain: Toolchain) -> list[str]:
    """The command that CMake compiles with: of this machine's programs the one that CXX names, arguments included, if it is set.

    Raises:
        UserError: CXX is no command.
    """
    named = os.environ.get("CXX", "") if toolchain is _NATIVE else ""
    try:
        return shlex.split(named) or [toolchain.compiler]
    except ValueError as error:
        raise UserError(f"CXX is {named!r}, which is no command ({error}); set it to a C++ compiler, or unset it") from error


def executorch_package(architecture: str) -> Path:
    """The package `executorch` for an architecture: as installed, or unpacked from the same version's wheel of it.

    Raises:
        UserError: unknown architecture, it is not installed, or the wheel cannot be downloaded.
    """
    wheel, requirement = _toolchain(architecture).wheel, f"executorch=={executorch_version().partition('+')[0]}"
    if wheel is None:
        return Path(str(distribution("executorch").locate_file("executorch")))

    def unpack(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="gcvit-edge-") as work:
            pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--only-binary=:all:"]
            _run([*pip, f"--platform={wheel}", f"--dest={work}", requirement], f"download {requirement} for {wheel}")
            with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as archive:
                wanted = ("executorch/include/", "executorch/lib/", "executorch/share/")
                archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wanted)])

    return _kept(f"wheel-{wheel}", [requirement], unpack) / "executorch"


def _kept(name: str, decided_by: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The folder of the cache that `make` filled from `decided_by`, made now if it is not there; whole or absent."""
    import platformdirs

    key = hashlib.sha256("\0".join(decided_by).encode()).hexdigest()[:16]
    root = Path(platformdirs.user_cache_dir("gcvit-edge"))
    folder = root / f"{name}-{key}"
    if not folder.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            _clean(root)
            with tempfile.TemporaryDirectory(prefix="unfinished-", dir=root) as parent:
                made = Path(parent) / "made"
                make(made)
                made.rename(folder)
        except OSError as error:
            if is_full(error):
                raise CheckFailed(f"cannot write {folder}: {error.strerror}; make room") from error
            if not folder.is_dir():  # else another process was first
                raise UserError(f"cannot write {folder}: {error}; set XDG_CACHE_HOME to a folder that can be written") from error
    return folder


def _clean(root: Path) -> None:
    """Removes what was left unfinished there by processes that were killed."""
    for unfinished in root.glob("unfinished-*"):
        with suppress(OSError):  # another process was first
            if time.time() - unfinished.stat().st_mtime > _DAY:
                shutil.rmtree(unfinished, ignore_errors=True)


def _texts(names: Sequence[str]) -> list[str]:
    return [(_SOURCES / name).read_text(encoding="utf-8") for name in names]


def _identity(compiler: Sequence[str]) -> str:
    """The compiler's own first line about itself."""
    return _run([*compiler, "--version"], f"ask the compiler {compiler[0]} for its version").partition("\n")[0]


def _run(command: Sequence[str], purpose: str) -> str:
    """Runs it; returns what it prints."""
    # LC_ALL: it is read. DESTDIR: of another project's installation, below which CMake would install
    environment = {name: value for name, value in os.environ.items() if name != "DESTDIR"} | {"LC_ALL": "C"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment, check=False
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        if os.strerror(errno.ENOSPC) in done.stdout:
            raise CheckFailed(f"cannot {purpose}: {os.strerror(errno.ENOSPC)}; make room:\n{tail}")
        raise UserError(f"cannot {purpose}: {command[0]} ended with {done.returncode}:\n{tail}")
    return done.stdout
