"""A device that one reaches through a POSIX shell: what `ssh` and `adb` have in common.

All that is put there lies in one folder, `gcvit-edge/run-PID`. PID is the keeper: a shell on the device that waits for the end of
its standard input and then kills what still runs and removes the folder, no matter whether this program is done, was killed or
lost the connection. What it cannot remove, because the device lost its power, the next connection does.
"""

import hashlib
import select
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import IO, TYPE_CHECKING

from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.targets import Case, Connection, Session
from gcvit_edge.targets._cpus import CPUS_SCRIPT, fastest_first
from gcvit_edge.targets._process import ProcessSession

if TYPE_CHECKING:
    from gcvit_edge.artifact import Artifact
    from gcvit_edge.machine import Machine

_GREETING = "gcvit-edge works in "
_END = "gcvit-edge ended with "
_START_SECONDS = 60  # for the first answer, names looked up and keys exchanged
_CALL_SECONDS = 60  # for a short script, and for a file besides
_BYTES_PER_SECOND = 50_000  # slowest connection that is waited for

# HUP: some devices send it to all that an ended connection has started
_KEEPER = r"""
trap '' HUP PIPE
umask 077
mkdir -p {parent}/gcvit-edge && cd {parent}/gcvit-edge || exit 1
for old in run-*; do kill -0 "${{old#run-}}" 2>/dev/null || rm -rf "$old"; done
mkdir "run-$$" || exit 1
cd "run-$$"
echo "{greeting}$(pwd)"
cat > /dev/null
kill -9 $(cat */pid 2>/dev/null) 2>/dev/null
cd ..
rm -rf "run-$$"
cd ..
rmdir gcvit-edge 2>/dev/null
:
"""

_START = r"""
mkdir {folder} || exit 1
sh -c 'echo $$ > "$0" && exec "$@"' {folder}/pid {command}
code=$?
rm -f {folder}/pid
exit $code
"""


@dataclass(frozen=True)
class RemoteOptions:
    """Options of every such target."""

    remote_dir: str | None = field(default=None, metadata={"help": "folder on the device in which to work"})
    runner: Path | None = field(
        default=None, metadata={"help": "runner built for the device, its libraries in `lib` beside it (default: built here)"}
    )
    keep_files: bool = field(default=False, metadata={"help": "leave runner and artifacts on the device, by hash, for the next time"})


def cases(artifacts: "Sequence[Artifact]", options: RemoteOptions) -> list[Case]:
    """What the runner runs."""
    return [Case(artifact, "cpu") for artifact in artifacts if artifact.backend == "executorch"]


class Shell(ABC):
    """A way to the shell of a device. name: of the device, in messages. parent: shell word, default of `remote_dir`."""

    name: str
    parent: str

    @abstractmethod
    def command(self, script: str) -> list[str]:
        """The command of this machine that runs a script there, with its standard input, output, error and exit code."""

    def first_command(self, script: str) -> list[str]:
        """That of the keeper's script, which starts before all others and ends after them."""
        return self.command(script)

    @abstractmethod
    def refusal(self, printed: str) -> str:
        """What to do, when the first command ended with this on standard error."""

    def run(self, script: str, content: bytes = b"") -> bytes:
        """What a script prints that reads `content`.

        Raises:
            CheckFailed: it, or the connection, failed.
        """
        # the end says its exit code: a lost connection is 255 to ssh, as a script may be, and 0 to some versions of adb
        done = self.call(self.command(f"({script}\n)\necho '{_END}'$? >&2"), content)
        text, end, code = done.stderr.decode(errors="replace").rpartition(_END)
        if not end:
            raise CheckFailed(f"the connection to {self.name} was lost: {code.strip() or 'it ended'}")
        if int(code):
            raise self.failure(text, int(code))
        return done.stdout

    def call(self, command: Sequence[str], content: bytes = b"", size: int = 0) -> "subprocess.CompletedProcess[bytes]":
        """Runs a command of this machine that moves `size` bytes besides `content`.

        Raises:
            CheckFailed: it takes too long.
        """
        limit = _CALL_SECONDS + (len(content) + size) / _BYTES_PER_SECOND
        try:
            return subprocess.run(command, input=content, capture_output=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired as error:
            raise CheckFailed(f"{self.name} did not answer within {limit:.0f} s; check the connection") from error

    def failure(self, printed: str, code: int) -> CheckFailed:
        """The error of something that failed there and printed this."""
        return CheckFailed(f"{self.name}: {_last_lines(printed.strip()) or f'exit code {code}'}{_advice(printed)}")

    def send(self, content: bytes, path: str) -> None:
        """Writes a file there."""
        self.run(f"cat > {quote(path)}", content)

    def receive(self, path: str) -> bytes:
        """Reads a file there."""
        return self.run(f"cat {quote(path)}")


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-15:])


def _advice(text: str) -> str:
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return "; make room there, or choose another folder with --remote-dir"
    return ""


@contextmanager
def connect_shell(shell: Shell, options: RemoteOptions, build: Callable[[str], Path]) -> Iterator[Connection]:
    """The device behind a shell; its folder there is gone afterwards.

    build: builds the runner for an architecture (`uname -m`), where the user has given none.

    Raises:
        UserError: the device cannot be reached, or the runner is not for its architecture.
        CheckFailed: its disk is full.
    """
    parent = quote(options.remote_dir) if options.remote_dir else shell.parent
    keeper = _Keeper(shell, parent)
    try:
        given = options.runner
        yield Remote(shell, keeper, (lambda _: given) if given else build, keep_files=options.keep_files)
    finally:
        keeper.close()


class _Keeper:
    """The keeper's end on this machine. folder: the one that it keeps, absolute."""

    def __init__(self, shell: Shell, parent: str) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        command = shell.first_command(_KEEPER.format(parent=parent, greeting=_GREETING))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        assert self._process.stdout is not None
        answered, _, _ = select.select([self._process.stdout], [], [], _START_SECONDS)
        line = self._process.stdout.readline().decode(errors="replace").rstrip("\n") if answered else ""
        if line.startswith(_GREETING):
            self.folder = line.removeprefix(_GREETING)
            return
        if not answered:
            self._process.kill()
        self.close()
        if not answered:
            raise UserError(f"{shell.name} did not answer within {_START_SECONDS} s; is it switched on, and its network up?")
        if line:
            raise UserError(
                f"{shell.name} says {line!r} before any command; its login shell must print nothing when it is not interactive "
                "(look into ~/.bashrc there)"
            )
        if advice := _advice(self.printed):
            raise CheckFailed(f"{shell.name}: {_last_lines(self.printed)}{advice}")
        raise UserError(f"cannot use {shell.name}: {_last_lines(self.printed)}; {shell.refusal(self.printed)}")

    def alive(self) -> bool:
        """Whether the connection still holds; called when something failed, which may be noticed before its cause."""
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            return True
        return False

    def close(self) -> None:
        try:
            self._process.communicate(timeout=_START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        if not self._log.closed:
            self._log.seek(0)
            self.printed = self._log.read().decode(errors="replace").strip()
            self._log.close()


class Remote(Connection):
    """A device behind a shell."""

    def __init__(self, shell: Shell, keeper: _Keeper, build: Callable[[str], Path], *, keep_files: bool) -> None:
        self.shell, self.keeper = shell, keeper
        self.folders: list[_SessionFolder] = []
        self._by_hash = str(Path(keeper.folder).parent) if keep_files else keeper.folder
        self._build = build
        self._runner: str | None = None
        self._sessions = 0

    def machine(self) -> "Machine":
        from gcvit_edge.machine import FACTS_SCRIPT, parse_facts

        return parse_facts(self.shell.run(FACTS_SCRIPT).decode(errors="replace"))

    def open(self, case: Case, threads: int, *, pinned: bool) -> Session:
        model = self._push({file.name: file for file in case.artifact.files}) + "/" + case.artifact.path.name
        command = [self._push_runner(), model, str(threads)]
        cpus = fastest_first(self.shell.run(CPUS_SCRIPT).decode(errors="replace")) if pinned else []
        if threads < len(cpus):
            command += ["--cpus", ",".join(map(str, cpus[:threads]))]
        self._sessions += 1
        folder = _SessionFolder(self, f"{self.keeper.folder}/{self._sessions}")
        script = _START.format(folder=quote(folder.root), command=" ".join(map(quote, command)))
        return RemoteSession(case.artifact, self.shell.command(script), folder)

    def _push_runner(self) -> str:
        """The runner's path there."""
        if self._runner is None:
            architecture = self.shell.run("uname -m").decode().strip()
            runner = self._build(architecture)
            _check_architecture(runner, architecture, self.shell.name)
            libraries = {f"lib/{file.name}": file for file in sorted((runner.parent / "lib").glob("*.so*"))}
            self._runner = f"{self._push({runner.name: runner, **libraries})}/{runner.name}"
        return self._runner

    def _push(self, files: dict[str, Path]) -> str:
        """The folder there that has these files, by their paths in it; sent unless it is there already."""
        contents = {name: file.read_bytes() for name, file in files.items()}
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        folder = f"{self._by_hash}/{hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()}"
        if self._sums(folder, list(files)) == list(sums.values()):
            return folder
        incoming = f"{self.keeper.folder}/incoming"  # whole or not at all: only a complete folder gets its name
        parents = " ".join(dict.fromkeys(quote(f"{incoming}/{name}".rpartition("/")[0]) for name in files))
        self.shell.run(f"rm -rf {quote(folder)} {quote(incoming)} && mkdir -p {parents}")
        for name, content in contents.items():
            self.shell.send(content, f"{incoming}/{name}")
        if self._sums(incoming, list(files)) != list(sums.values()):
            raise CheckFailed(f"{self.shell.name}: what was sent did not arrive whole; check the disk and the connection of the device")
        self.shell.run(f"chmod -R u+x {quote(incoming)} && mv {quote(incoming)} {quote(folder)}")
        return folder

    def _sums(self, folder: str, names: Sequence[str]) -> list[str]:
        """SHA-256 of files there; fewer where some are missing."""
        words = " ".join(map(quote, names))
        printed = self.shell.run(f"cd {quote(folder)} 2>/dev/null && sha256sum {words} 2>/dev/null; :").decode()
        return [line.split()[0] for line in printed.splitlines()]


# e_machine in the header of an ELF file, by what `uname -m` prints; each also takes the 32 bit kind
_ELF_MACHINES = {
    "x86_64": {62: "x86_64", 3: "i386"},
    "aarch64": {183: "aarch64", 40: "arm"},
    "armv7l": {40: "arm"},
    "riscv64": {243: "riscv64"},
}


def _check_architecture(executable: Path, architecture: str, device: str) -> None:
    """Raises UserError for an ELF file of another architecture; a script may be for any."""
    try:
        header = executable.read_bytes()[:20]
    except OSError as error:
        raise UserError(f"cannot read runner {executable}: {error.strerror}; build one for the device, or leave --runner out") from error
    known = _ELF_MACHINES.get(architecture)
    machine = int.from_bytes(header[18:20], "little")
    if known is None or not header.startswith(b"\x7fELF") or machine in known:
        return
    names = {number: name for kinds in _ELF_MACHINES.values() for number, name in kinds.items()}
    raise UserError(f"runner {executable} is built for {names.get(machine, f'ELF machine {machine}')}, but {device} is {architecture}")


class _SessionFolder:
    """What one session has there: its own files, and inputs by hash, which sessions share as long as one of them holds them."""

    def __init__(self, device: Remote, root: str) -> None:
        self.root, self.inputs = root, dict[str, str]()
        self.device = device
        device.folders.append(self)

    def put(self, name: str, content: bytes) -> None:
        path = f"{self.device.keeper.folder}/{hashlib.sha256(content).hexdigest()}.f32"
        if self.inputs.get(name) == path:
            return
        self._drop(name)  # first: small boards have room for one chunk
        if not any(path in folder.inputs.values() for folder in self.device.folders):
            self.device.shell.send(content, path)
        self.inputs[name] = path

    def get(self, name: str) -> bytes:
        return self.device.shell.receive(self.path(name))

    def path(self, name: str) -> str:
        return self.inputs.get(name, f"{self.root}/{name}")

    def remove(self) -> None:
        if self not in self.device.folders:
            return
        self.device.folders.remove(self)
        if not self.device.keeper.alive():
            return  # the keeper does it
        root = quote(self.root)
        self.device.shell.run(f"kill -9 $(cat {root}/pid 2>/dev/null) 2>/dev/null; rm -rf {root}")
        for name in list(self.inputs):
            self._drop(name)

    def _drop(self, name: str) -> None:
        path = self.inputs.pop(name, None)
        if path and not any(path in folder.inputs.values() for folder in self.device.folders):
            self.device.shell.run(f"rm -f {quote(path)}")


class RemoteSession(ProcessSession):
    """An artifact in a runner on the device."""

    def __init__(self, artifact: "Artifact", command: Sequence[str], folder: _SessionFolder) -> None:
        self._device = folder.device
        super().__init__(artifact, command, folder)

    def _ending(self, code: int) -> str:
        if not self._device.keeper.alive():
            return f"the connection to {self._device.shell.name} was lost"
        if code in (126, 127):
            return (
                f"{self._device.shell.name} cannot start the runner, which needs a 64-bit system with glibc 2.34; "
                "for another one build it there and give it with --runner"
            )
        return f"{super()._ending(code)} on {self._device.shell.name}"


def program_missing(program: str, package: str) -> str | None:
    """For `missing`: what to install if `program` is not on this machine."""
    return None if shutil.which(program) else f"the program {program} is not installed: apt-get install {package}"
