"""The shell of a device: scripts and files through it, and the keeper, which leaves nothing behind there.

All that is put there lies in one folder, `gcvit-edge/run-PID-BOOT@HOST`. PID is the keeper: a shell on the device that waits for the
end of its standard input, or for too long a silence there, and then kills what still runs and removes the folder, no matter whether this
program is done, was killed or lost the connection, with a word or without one. What it cannot remove, because the device lost its
power, the next connection to this device does. BOOT is the kernel's name of the device's start, after which PID may be another process.
HOST is its name: boards may share the home folder.
"""

import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from shlex import quote
from typing import IO

from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.targets._timeout import readable

_GREETING = "gcvit-edge works in "
_END = "gcvit-edge ended with "
_START_SECONDS = 60  # for the first answer, names looked up and keys exchanged
_CALL_SECONDS = 60  # for a short script, and for a file besides
_LONGEST_GREETING = 10_000  # bytes, a path in it; a device that says more without an end of line is none
_BYTES_PER_SECOND = 50_000  # slowest connection that is waited for

BEAT_SECONDS = 5  # a line to the keeper
SILENT_BEATS = 12  # a minute without one, and the connection is lost, to either side: longer than a Wi-Fi's change of cells takes

# begins every script, as what it prints is read: in the user's language programs say other things, and with CDPATH `cd` says where to
PREAMBLE = "export LC_ALL=C\nunset CDPATH\n"

# HUP: some devices send it to all that an ended connection has started. Again: a command may be under way that makes a file.
# made: folders on the way that are not there yet. start: again, as another keeper, when it ends, removes the folder of all of them as long
# as nothing is in it; what it printed is of the last time. The beats: only who reads can tell that there are some, and only who does not
# wait for them that there are none, so these are two processes
_KEEPER = r"""
trap '' HUP PIPE
umask 077
above={parent}
made=gcvit-edge
while [ ! -d "$above" ] && [ "$above" != / ] && [ "$above" != . ]; do
    made="$(basename "$above")/$made"
    above=$(dirname "$above")
done
above=$(cd "$above" && pwd)
host=$(uname -n)
boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)
run="run-$$-$boot@$host"
home=$(pwd)
folder=
start() {{
    cd "$home" && mkdir -p {parent}/gcvit-edge && cd {parent}/gcvit-edge || return
    for old in run-*"@$host"; do
        pid=${{old#run-}}
        pid=${{pid%%-*}}
        [ "$old" != "$run" ] && [ "$old" = "run-$pid-$boot@$host" ] && kill -0 "$pid" 2>/dev/null || rm -rf "$old"
    done
    mkdir "$run" && cd "$run" && folder=$(pwd)
}}
for again in 1 2 3 4 5 6 7 8 9; do start 2> /dev/null && break; done
[ "$folder" ] || start || exit 1
clean() {{
    cd "$folder" || return
    kill -9 $(cat */pid 2>/dev/null) 2>/dev/null
    cd ..
    for again in 1 2 3 4 5; do rm -rf "$run" && break; sleep 1; done
    cd "$above" && rmdir -p "$made" 2>/dev/null
}}
silent=0
(cd /; while sleep {beat} && [ -d "$folder" ]; do
    silent=$((silent + 1))
    rm "$folder/beat" && silent=0
    [ $silent -lt {beats} ] || {{ kill -9 $$; clean; }}
done) < /dev/null > /dev/null 2>&1 &
watcher=$!
echo "{greeting}$folder"
while read -r line; do true > beat; done
kill $watcher
clean
:
"""


def program_missing(program: str, package: str) -> str | None:
    """For `missing`: what to install if `program` is not on this machine."""
    return None if shutil.which(program) else f"the program {program} is not installed: apt-get install {package}"


class Shell(ABC):
    """A way to the shell of a device. name: of the device, in messages. parent: shell word, default of `remote_dir`. needs: what the
    runner that is made for it asks of its system."""

    name: str
    parent: str
    needs: str = ""

    @abstractmethod
    def command(self, script: str) -> list[str]:
        """The command of this machine that runs a script there, with its standard input, output, error and exit code."""

    def first_command(self, script: str) -> list[str]:
        """That of the keeper's script, which starts before all others and ends after them."""
        return self.command(script)

    @abstractmethod
    def refusal(self, printed: str) -> str:
        """What to do, when the first command ended with this on standard error."""

    def run(self, script: str, content: bytes = b"", size: int = 0) -> bytes:
        """What a script prints that reads `content`, and `size` bytes of its own besides.

        Raises:
            CheckFailed: it, or the connection, failed.
        """
        # the end says its exit code: a lost connection is 255 to ssh, as a script may be, and 0 to some versions of adb
        done = self.call(self.command(f"{PREAMBLE}({script}\n)\necho '{_END}'$? >&2"), content, size)
        printed = done.stderr.decode(errors="replace")
        end = re.search(f"{_END}(\\d+)\n", printed)  # what started the shell there may have a last word
        if not end:
            raise CheckFailed(f"the connection to {self.name} was lost: {printed.strip() or 'it ended'}")
        if int(end[1]):
            raise self.failure(printed[: end.start()], int(end[1]))
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


class Keeper:
    """The keeper of a folder on the device, from this machine. folder: its absolute path there."""

    def __init__(self, shell: Shell, parent: str) -> None:
        """Makes the folder. parent: shell word, the folder to make it in.

        Raises:
            UserError: the device cannot be reached, or the folder cannot be made.
            CheckFailed: its disk is full.
        """
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        script = PREAMBLE + _KEEPER.format(parent=parent, greeting=_GREETING, beat=BEAT_SECONDS, beats=SILENT_BEATS)
        command = shell.first_command(script)
        self._ended = threading.Event()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        try:
            answered, line = self._first_line()
        except BaseException:
            self._process.kill()
            self.close()
            raise
        if answered and line.startswith(_GREETING):
            self.folder = line.removeprefix(_GREETING)
            threading.Thread(target=self._beat, daemon=True).start()
            return
        if not answered:
            self._process.kill()
        self.close()
        if not answered and not line:
            raise UserError(f"{shell.name} did not answer within {_START_SECONDS} s; is it switched on, and its network up?")
        if line:
            raise UserError(
                f"{shell.name} says {line[:200]!r} before any command; its login shell must print nothing when it is not interactive "
                "(look into ~/.bashrc there)"
            )
        if advice := _advice(self.printed):
            raise CheckFailed(f"{shell.name}: {_last_lines(self.printed)}{advice}")
        raise UserError(f"cannot use {shell.name}: {_last_lines(self.printed)}; {shell.refusal(self.printed)}")

    def _first_line(self) -> tuple[bool, str]:
        """What it says first, and whether it has said all of that in time or has ended: the prompt of another program has no line's end."""
        assert self._process.stdout is not None
        line = b""
        deadline = time.monotonic() + _START_SECONDS
        while not line.endswith(b"\n"):
            seconds = deadline - time.monotonic()
            if seconds <= 0 or len(line) > _LONGEST_GREETING or not readable(self._process.stdout, seconds):
                return False, line.decode(errors="replace")
            if not (part := os.read(self._process.stdout.fileno(), 1)):  # no more than the line
                break
            line += part
        return True, line.decode(errors="replace").rstrip("\n")

    def _beat(self) -> None:
        """Tells the keeper again and again that somebody is there."""
        assert self._process.stdin is not None
        while not self._ended.wait(BEAT_SECONDS):
            try:
                os.write(self._process.stdin.fileno(), b"\n")
            except OSError:  # the connection is lost, which the next command says
                return

    def alive(self) -> bool:
        """Whether the connection still holds; called when something failed, which may be noticed before its cause."""
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            return True
        return False

    def close(self) -> None:
        self._ended.set()
        try:
            self._process.communicate(timeout=_START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        if not self._log.closed:
            self._log.seek(0)
            self.printed = self._log.read().decode(errors="replace").strip()
            self._log.close()
