"""Devices for the tests, on this machine: a real sshd with a throwaway key, and Android's real adbd."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from gcvit_edge.targets._remote import RemoteOptions

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
ADBD = Path(__file__).parents[1] / "build" / "adbd"


def need(found: object, what: str) -> None:
    """Skips without it; in CI it is always there."""
    if not found:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"needs {what}")


@dataclass(frozen=True)
class Board:
    """An sshd on 127.0.0.1 that lets `key` in. config: that of an ssh that knows it as `board`. pid: of the listening sshd."""

    folder: Path
    config: Path
    pid: int

    def configure(self, **changes: str) -> Path:
        """A configuration with other values, such as `IdentityFile`."""
        lines = [line for line in self.config.read_text().splitlines() if line.split()[0] not in changes]
        changed = self.folder / f"config{len(list(self.folder.glob('config*')))}"
        changed.write_text("\n".join([*lines, *(f"  {name} {value}" for name, value in changes.items())]) + "\n")
        return changed

    def connections(self) -> list[int]:
        """Process numbers of the sshd of every connection."""
        return [int(line) for line in subprocess.run(["pgrep", "-P", str(self.pid)], capture_output=True, text=True).stdout.split()]

    def processes(self) -> list[int]:
        """Process numbers of the sshds of every connection, the user's part first, where sshd has one."""
        found = self.connections()
        for pid in list(found):
            users = subprocess.run(["pgrep", "-P", str(pid), "sshd"], capture_output=True, text=True).stdout.split()
            found = [*map(int, users), *found]
        return found


@contextmanager
def start_sshd(folder: Path) -> Iterator[Board]:
    """Starts one; ends it and its connections afterwards."""
    need(SSHD, "openssh-server")
    assert SSHD
    Path("/run/sshd").mkdir(exist_ok=True) if os.geteuid() == 0 else None
    for name in ("host", "key", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    server, port = _serve(folder)
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/key\n"
        f"  IdentitiesOnly yes\n  IdentityAgent none\n  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile none\n"
    )
    board = Board(folder, folder / "config", server.pid)
    try:
        yield board
        assert server.poll() is None, f"sshd ended with {server.returncode} before its time:\n{(folder / 'sshd.log').read_text()[-3000:]}"
    finally:
        connections = board.connections()
        server.terminate()
        server.wait()
        for pid in connections:
            with suppress(ProcessLookupError):  # it may end just now
                os.kill(pid, signal.SIGTERM)


def _serve(folder: Path) -> "tuple[subprocess.Popen[bytes], int]":
    """An sshd that listens, and its port: a free one, which another program may take before sshd does; then again."""
    assert SSHD
    for _ in range(5):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        (folder / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
            f"SetEnv HOME={folder}\n"  # away from the start-up files of the user's shell
        )
        log = folder / "sshd.log"
        with log.open("wb") as errors:
            server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=errors)
        # its own word: a connection to the port would be answered by whoever has taken it, even by itself
        wait_for(lambda log=log, server=server: "Server listening" in log.read_text() or server.poll() is not None, "sshd")
        if server.poll() is None:
            return server, port
    raise AssertionError(f"sshd does not start:\n{log.read_text()}")


def wait_for(condition, what: str, seconds: float = 15) -> None:
    """Waits until it is true; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: still not so after {seconds} s"
        time.sleep(0.02)


def left(options: RemoteOptions) -> list[Path]:
    """What is left on the device, which is this machine; it may be going just now."""
    return [Path(folder, name) for folder, folders, files in os.walk(str(options.remote_dir)) for name in (*folders, *files)]


def pids_below(folder: Path) -> list[int]:
    """Process numbers of the programs that lie below a folder and run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "exe").readlink().is_relative_to(folder):
                found.append(int(process.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


@dataclass(frozen=True)
class Phone:
    """An adbd. serials: adb lists it under two. server: where adb finds the adb server that knows it."""

    serials: tuple[str, str]
    server: str
    pid: int


@contextmanager
def start_adbd(folder: Path) -> Iterator[Phone]:
    """Starts Android's adbd and an adb server that knows it, and ends both afterwards.

    adbd listens on all interfaces and lets everyone in, hence the network of its own; the server is reached by a file.
    """
    need(shutil.which("adb"), "adb")
    need((ADBD / "usr/sbin/adbd").exists(), "adbd in build/adbd: run scripts/install_adbd.sh build/adbd")
    libraries = next((ADBD / "usr/lib").glob("*-linux-gnu"))
    loader = f"{next(libraries.glob('ld-linux*'))} --library-path {libraries}/android:{libraries}"
    socket_file = folder / "adb"
    # adb takes what it finds on the ports from 5555 to 5585 when it starts for emulators, and would know adbd under a third name
    environment = os.environ | {"ADB_SERVER_SOCKET": f"localfilesystem:{socket_file}", "ADBD_PORT": "5600"}
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    program = ADBD / "usr/lib/android-sdk/platform-tools/adbd"
    script = f"ip link set lo up; {loader} {program} & echo $!; exec 1>&2; adb nodaemon server & wait"
    serials = "127.0.0.1:5600", "localhost:5600"

    def adb(*words: str) -> str:
        return subprocess.run(["adb", *words], env=environment, capture_output=True, text=True).stdout

    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*unshare, "sh", "-c", script], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
        assert server.stdout
        try:
            pid = int(server.stdout.readline())
            wait_for(socket_file.exists, "adb server")  # else the first adb would start one of its own
            for serial in serials:
                wait_for(lambda serial=serial: "connected to" in adb("connect", serial), "adbd")
            wait_for(lambda: adb("devices").count("\tdevice") == 2, "adb knows both names")
            yield Phone(serials, environment["ADB_SERVER_SOCKET"], pid)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.communicate()
