"""A Linux board, by the OpenSSH client: Raspberry Pi, Jetson, any machine with 64-bit Linux. The user's own configuration holds."""

import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gcvit_edge.errors import UserError
from gcvit_edge.targets import Connection, _shell
from gcvit_edge.targets._process import runner_cases as cases
from gcvit_edge.targets._remote import RemoteOptions, connect_shell
from gcvit_edge.targets._shell import Shell, program_missing
from gcvit_edge.targets._sockets import socket_folder

__all__ = ["ADDRESS", "HELP", "MEASURES_TIME", "Options", "cases", "connect", "missing"]

HELP = "a Linux board, ssh:[USER@]HOST, as your ssh finds it; runs executorch, by the native runner"
ADDRESS = "required"
MEASURES_TIME = True

CONNECT_SECONDS = 10
_PLAIN = frozenset(string.ascii_letters + string.digits + " -./_")

# what ssh, or the first script there, prints, and what helps
_REFUSALS = {
    "mkdir: ": "choose a folder that you may write to with --remote-dir",
    "cd: ": "choose a folder that you may write to with --remote-dir",  # it is there already, as another user's
    "Permission denied (": "a key must let you in without a password: ssh-copy-id {host}",
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "its key is another than last time; if you know why, ssh-keygen -R and connect by hand once",
    "Host key verification failed": "its key is not known; connect once by hand, ssh {host}, and compare the fingerprint",
    "Could not resolve": "check the name",
    "Can't open user config file": "check --ssh-config",
    "Connection refused": "it is there, but has no SSH server on this port; switch it on",
    "timed out": "is it switched on, and in this network?",
    "No route to host": "is it switched on, and in this network?",
}


@dataclass(frozen=True)
class Options(RemoteOptions):
    """Options of every remote target, and one of ssh."""

    ssh_config: Path | None = field(default=None, metadata={"help": "configuration of ssh to use instead of the user's"})


def missing(address: str) -> str | None:
    return program_missing("ssh", "openssh-client")


@contextmanager
def connect(address: str, options: Options) -> Iterator[Connection]:
    if address.startswith("-"):
        raise UserError(f"ssh:{address}: an address is [USER@]HOST, not an option of ssh")
    with (
        socket_folder() as folder,
        connect_shell(Ssh(address, options.ssh_config, Path(folder) / "ssh"), options, _build) as device,
    ):
        yield device


def _build(architecture: str) -> Path:
    from gcvit_edge.native.build import architectures, build_runner

    if architecture not in architectures():
        known = ", ".join(architectures())
        raise UserError(f"the runner is built for {known}, not for {architecture}; build one there and give it with --runner")
    return build_runner(architecture).executable


class Ssh(Shell):
    """The shell behind one control connection: the keeper's. socket: where it is shared."""

    parent = '"${XDG_CACHE_HOME:-$HOME/.cache}"'
    needs = " with glibc 2.34"

    def __init__(self, host: str, config: Path | None, socket: Path) -> None:
        self.name = host
        self._ssh = ["ssh", "-T", *(["-F", str(config)] if config else []), "-S", str(socket).replace("%", "%%")]
        for option in (  # PermitLocalCommand: what the user's LocalCommand prints would be taken for the board's
            "BatchMode=yes", "PermitLocalCommand=no", f"ConnectTimeout={CONNECT_SECONDS}", f"ServerAliveInterval={_shell.BEAT_SECONDS}",
            f"ServerAliveCountMax={_shell.SILENT_BEATS}", "ControlPersist=no", "ClearAllForwardings=yes", "RemoteCommand=none",
            "LogLevel=ERROR",
        ):  # fmt: skip
            self._ssh += ["-o", option]

    def command(self, script: str) -> list[str]:
        # ProxyCommand: without the control connection ssh would make another one, unasked
        return [*self._ssh, "-o", "ControlMaster=no", "-o", "ProxyCommand=false", "--", self.name, self._word(script)]

    def first_command(self, script: str) -> list[str]:
        return [*self._ssh, "-o", "ControlMaster=yes", "--", self.name, self._word(script)]

    def refusal(self, printed: str) -> str:
        advice = next((text for sign, text in _REFUSALS.items() if sign in printed), "see whether this works: ssh {host} true")
        return advice.format(host=self.name)

    @staticmethod
    def _word(script: str) -> str:
        """The login shell may be any, and in csh a word has no line break, so all that means something to a shell goes as octal numbers."""
        plain = "".join(chr(byte) if chr(byte) in _PLAIN else f"\\0{byte:03o}" for byte in script.encode())
        return f'exec sh -c \'eval "$(printf %b "{plain}")"\''
