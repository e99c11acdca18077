"""An Android phone or board, by Android's adb."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gcvit_edge.errors import UserError, unknown_name
from gcvit_edge.targets import Connection
from gcvit_edge.targets._process import runner_cases as cases
from gcvit_edge.targets._remote import RemoteOptions, connect_shell
from gcvit_edge.targets._shell import Shell, program_missing

__all__ = ["ADDRESS", "HELP", "MEASURES_TIME", "Options", "cases", "connect", "missing"]

HELP = "an Android device, adb[:SERIAL], as `adb devices` lists it; runs executorch, by the native runner, built by Android's NDK"
ADDRESS = "optional"
MEASURES_TIME = True

_SERVER_SECONDS = 60
_STATES = {
    "unauthorized": "unlock it and allow debugging from this computer",
    "offline": "unplug it and plug it in again, or restart it",
    "no permissions": "this user may not use its USB port: see https://developer.android.com/tools/device",
}


@dataclass(frozen=True)
class Options(RemoteOptions):
    """Options of every remote target."""


def missing(address: str) -> str | None:
    return program_missing("adb", "adb")


@contextmanager
def connect(address: str, options: Options) -> Iterator[Connection]:
    serial = choose_device(address or os.environ.get("ANDROID_SERIAL", ""))
    with connect_shell(Adb(serial), options, _build) as device:
        yield device


def _build(architecture: str) -> Path:
    from gcvit_edge.native import android

    if architecture != android.ARCHITECTURE:
        raise UserError(f"the runner for Android is built for {android.ARCHITECTURE}, not for {architecture}; give one with --runner")
    try:
        return android.build_android_runner().executable
    except UserError as error:
        raise UserError(f"{error}; or give a runner that is built for Android with --runner") from error


def choose_device(serial: str) -> str:
    """The serial number of the device `serial`, or of the only one if that is "".

    Raises:
        UserError: there is no such device, there are none or several, or it is not ready.
    """
    try:
        done = subprocess.run(["adb", "devices"], capture_output=True, text=True, errors="replace", timeout=_SERVER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"adb does not answer within {_SERVER_SECONDS} s; `adb kill-server`, and try again") from None
    if done.returncode:
        raise UserError(f"adb does not work: {done.stderr.strip()}")
    lines = [line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line]
    states = {name.strip(): state.strip() for name, state in lines}
    if not states:
        raise UserError("adb knows no device; allow USB debugging on it and plug it in, or `adb connect HOST:PORT`")
    if not serial and len(states) > 1:
        raise UserError(f"adb knows {len(states)} devices; write one of {', '.join(f'adb:{name}' for name in states)}")
    if serial and serial not in states:
        raise unknown_name("Android device", serial, states)
    serial = serial or next(iter(states))
    if states[serial] != "device":
        advice = next((text for sign, text in _STATES.items() if states[serial].startswith(sign)), "restart it, or `adb kill-server`")
        raise UserError(f"Android device {serial} is not ready ({states[serial]}); {advice}")
    return serial


class Adb(Shell):
    """The shell of one device."""

    parent = "/data/local/tmp"

    def __init__(self, serial: str) -> None:
        self.name = serial
        self._adb = ["adb", "-s", serial]

    def command(self, script: str) -> list[str]:
        return [*self._adb, "shell", "-T", script]

    def refusal(self, printed: str) -> str:
        if "shell" in printed and "not support" in printed:
            return "Android 7 or later is needed"
        return "choose a folder that exists with --remote-dir, if it cannot make this one; else see what `adb shell` says"

    # files by push and pull, which later versions of adb compress

    def send(self, content: bytes, path: str) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self._transfer(len(content), "push", file.name, path)

    def receive(self, path: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "file"
            self._transfer(0, "pull", path, str(file))
            return file.read_bytes()

    def _transfer(self, size: int, *words: str) -> None:
        done = self.call([*self._adb, *words], size=size)
        if done.returncode:
            raise self.failure((done.stderr + done.stdout).decode(errors="replace"), done.returncode)
