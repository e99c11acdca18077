"""A device behind a shell that runs the native runner: what `ssh` and `adb` have in common."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from gcvit_edge.cpus import CPUS_SCRIPT, fastest_first
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.targets import Case, Connection, Session
from gcvit_edge.targets._process import ETDUMP, ProcessSession, profile_file
from gcvit_edge.targets._shell import PREAMBLE, Keeper, Shell
from gcvit_edge.targets._timeout import DEFAULT_SECONDS, TIMEOUT, check_timeout

if TYPE_CHECKING:
    from gcvit_edge.artifact import Artifact
    from gcvit_edge.measurement.machine import Machine

_PROFILE = "profile.etdump"
# pid: what to kill, the runner, and the process group of this session, which has its leader's number: a runner may be a script
_START = r"""
mkdir {folder} || exit 1
sh -c 'echo $$ $1 > "$0" && shift && exec "$@"' {folder}/pid -$$ {command}
code=$?
rm -f {folder}/pid
exit $code
"""


@dataclass(frozen=True)
class RemoteOptions:
    """Options of every such target."""

    remote_dir: str | None = field(default=None, metadata={"help": "folder on the device in which to work"})
    runner: Path | None = field(
        default=None, metadata={"help": "built for the device, libraries in `lib` beside it (default, except on Android: made here)"}
    )
    keep_files: bool = field(default=False, metadata={"help": "leave runner and artifacts on the device, by hash, for the next time"})
    etdump: Path | None = field(default=None, metadata=ETDUMP)
    timeout: int = field(default=DEFAULT_SECONDS, metadata=TIMEOUT)


@contextmanager
def connect_shell(shell: Shell, options: RemoteOptions, build: Callable[[str], Path]) -> Iterator[Connection]:
    """The device behind a shell; its folder there is gone afterwards.

    build: builds the runner for an architecture (`uname -m`), where the user has given none.

    Raises:
        UserError: `timeout` is not positive, the device cannot be reached, the runner is not for its architecture, or `remote_dir` is
            another user's `~`.
        CheckFailed: its disk is full.
    """
    check_timeout(options.timeout)
    parent = _folder_word(options.remote_dir) if options.remote_dir else shell.parent
    keeper = Keeper(shell, parent)
    try:
        given = options.runner
        yield Remote(shell, keeper, (lambda _: given) if given else build, options)
    finally:
        keeper.close()


def _folder_word(folder: str) -> str:
    """A folder there as a word of its shell; ~ is the home folder there."""
    if "\t" in folder or "\n" in folder:
        raise UserError(f"remote_dir: got {folder!r}, but a tab or a line break ends a word to the runner; give another folder")
    if folder == "~" or folder.startswith("~/"):
        return f'"$HOME"{quote(folder[1:])}'
    if folder.startswith("~"):
        raise UserError(f"remote_dir: got {folder}, but ~ is only the home folder of the user who logs in; give the whole path")
    return quote(folder)


class Remote(Connection):
    """A device behind a shell."""

    def __init__(self, shell: Shell, keeper: Keeper, build: Callable[[str], Path], options: RemoteOptions) -> None:
        self.shell, self.keeper, self.etdump = shell, keeper, options.etdump
        self.timeout = options.timeout
        self.folders: list[_SessionFolder] = []
        self._by_hash = str(Path(keeper.folder).parent) if options.keep_files else keeper.folder
        self._build = build
        self._runner: str | None = None
        self._sessions = 0

    def machine(self) -> "Machine":
        from gcvit_edge.measurement.machine import FACTS_SCRIPT, parse_facts

        return parse_facts(self.shell.run(FACTS_SCRIPT).decode(errors="replace"))

    def open(self, case: Case, threads: int, *, pinned: bool) -> Session:
        model = self._push({file.name: file for file in case.artifact.files}) + "/" + case.artifact.path.name
        command = [self._push_runner(), model, str(threads)]
        cpus = fastest_first(self.shell.run(CPUS_SCRIPT).decode(errors="replace")) if pinned else []
        if threads < len(cpus):
            command += ["--cpus", ",".join(map(str, cpus[:threads]))]
        self._sessions += 1
        folder = _SessionFolder(self, f"{self.keeper.folder}/{self._sessions}")
        if pinned and self.etdump is not None:
            command += ["--etdump", folder.path(_PROFILE)]
        script = PREAMBLE + _START.format(folder=quote(folder.root), command=" ".join(map(quote, command)))
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
        size = sum(map(len, contents.values()))
        if self._sums(folder, list(files), size) == list(sums.values()):
            return folder
        incoming = f"{self.keeper.folder}/incoming"  # whole or not at all: only a complete folder gets its name
        parents = " ".join(dict.fromkeys(quote(f"incoming/{name}".rpartition("/")[0]) for name in files))
        # cd: where the keeper has removed its folder already, mkdir -p must not make it again
        self.shell.run(f"rm -rf {quote(folder)} {quote(incoming)} && cd {quote(self.keeper.folder)} && mkdir -p {parents}")
        for name, content in contents.items():
            self.shell.send(content, f"{incoming}/{name}")
        if self._sums(incoming, list(files), size) != list(sums.values()):
            raise CheckFailed(f"{self.shell.name}: what was sent did not arrive whole; check the disk and the connection of the device")
        # another command may have made it meanwhile, and mv would move into it
        taken = f"if [ -d {quote(folder)} ]; then rm -rf {quote(incoming)}; else mv {quote(incoming)} {quote(folder)}; fi"
        self.shell.run(f"chmod -R u+x {quote(incoming)} && {taken}")
        return folder

    def _sums(self, folder: str, names: Sequence[str], size: int) -> list[str]:
        """SHA-256 of files there, of so many bytes together; fewer where some are missing."""
        words = " ".join(map(quote, names))
        printed = self.shell.run(f"cd {quote(folder)} 2>/dev/null && sha256sum {words} 2>/dev/null; :", size=size).decode()
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
        self._drop(name)  # first: small boards have room for two chunks, this and the one that others still hold
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
        super().__init__(artifact, command, folder, self._device.timeout)

    def close(self) -> None:
        try:
            if self._device.etdump is not None and self._process.poll() is None:
                shell, path = self._device.shell, quote(self._folder.path(_PROFILE))
                size = int(shell.run(f"[ ! -f {path} ] || wc -c < {path}") or 0)
                if size:  # else nothing was timed
                    self._keep(shell.run(f"cat {path}", size=size), self._device.etdump)
        finally:
            super().close()

    def _keep(self, profile: bytes, folder: Path) -> None:
        file = profile_file(folder, self.artifact)
        try:
            file.write_bytes(profile)
        except OSError as error:
            raise CheckFailed(f"cannot write profile {file}: {error.strerror}") from error

    def _ending(self, code: int) -> str:
        if not self._device.keeper.alive():
            return f"the connection to {self._device.shell.name} was lost"
        name = self._device.shell.name
        if code == 126 and "ermission denied" in self._printed():
            return f"{name} runs no programs from {self._device.keeper.folder}; choose another folder with --remote-dir"
        if code in (126, 127) or "version `GLIBC" in self._printed():  # the loader's word, whose exit code is 1
            return (
                f"{name} cannot start the runner, which needs a 64-bit system{self._device.shell.needs}; for another one build it there "
                "and give it with --runner"
            )
        return f"{super()._ending(code)} on {name}"
