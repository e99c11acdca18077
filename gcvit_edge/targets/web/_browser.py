"""Browsers of this machine: found, and started on a page without a window, without a driver and without the network."""

import json
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.errors import UserError
from gcvit_edge.targets._sockets import socket_folder

if TYPE_CHECKING:
    import psutil

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "microsoft-edge", "brave-browser", "firefox", "firefox-esr")

_CHROMIUM = (
    "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-quic", "--disable-extensions", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
_FIREFOX = ("--headless", "--no-remote", "--new-instance")
_FIREFOX_PREFERENCES = {
    "network.proxy.type": 1,  # a proxy that is not there, for all but 127.0.0.1
    "network.proxy.http": "127.0.0.1",
    "network.proxy.http_port": 9,
    "network.proxy.ssl": "127.0.0.1",
    "network.proxy.ssl_port": 9,
    "app.update.enabled": False,
    "browser.aboutwelcome.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "toolkit.telemetry.enabled": False,
}

# Runs the browser in the shell's place. Beside it something waits for the end of standard input, which comes with that of this
# program, however it ends, and then kills the whole process group. In two steps, so that it is no child of the browser.
_GUARD = 'exec 3<&0; ( (cat <&3; kill -KILL -$$) & ) > /dev/null; exec "$@" 3<&- < /dev/null'


def find_browser(name: str) -> str:
    """Path of the program `name`, a path itself or on PATH; "" is the first of `BROWSERS` that is there.

    Raises:
        UserError: there is none, or only Ubuntu's Firefox, which does not see the profile that it would be given.
    """
    paths = [path for path in map(shutil.which, [name] if name else BROWSERS) if path]
    found = next((path for path in paths if not _is_snap_of_firefox(path)), None)
    if found is None and paths:
        raise UserError(
            f"{paths[0]} is a snap, which sees no profile but those in its own folder; install another browser, such as Mozilla's own "
            "package of Firefox, and give it as web:BROWSER"
        )
    if found is None and name:
        raise UserError(f"browser {name!r} is not on PATH and no program; give web:BROWSER as a name such as firefox, or as a path")
    if found is None:
        raise UserError(f"no browser on PATH (looked for {', '.join(BROWSERS)}); install one, on Debian: apt install chromium")
    return found


def _is_snap_of_firefox(path: str) -> bool:
    """Ubuntu's own: a link to the program `snap`, or a script that starts that.

    Source: Mozilla's documentation of geckodriver, "Running Firefox in a container-based package".
    """
    if "firefox" not in Path(path).name.lower():
        return False
    if Path(path).resolve().name == "snap":
        return True
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(4096)
        return start.startswith(b"#!") and b"/snap/bin/" in start
    return False


def browser_version(path: str) -> str:
    """Name and version, such as "Chromium 150.0.7871.100".

    Raises:
        UserError: it does not start.
    """
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{path} does not start ({error}); give another browser as web:BROWSER") from error
    found = re.search(r"^.*?\d[\w.]*", shown.stdout, re.MULTILINE)
    if found is None:
        printed = (shown.stdout + shown.stderr).strip()[-200:]
        raise UserError(f"{path} --version says {printed!r}; give a Chromium or Firefox as web:BROWSER")
    return found.group()


class Browser:
    """A browser of its own on one page, with a new profile that goes with it."""

    def __init__(self, path: str, url: str) -> None:
        self._folder = socket_folder()
        profile = Path(self._folder.name) / "profile"
        profile.mkdir()
        self._log = Path(self._folder.name) / "log"
        if "firefox" in Path(path).name.lower():
            lines = [f'user_pref("{name}", {json.dumps(value)});\n' for name, value in _FIREFOX_PREFERENCES.items()]
            (profile / "user.js").write_text("".join(lines))
            command = [path, *_FIREFOX, "--profile", str(profile), url]
        else:
            root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to run as root
            command = [path, *_CHROMIUM, *root, f"--user-data-dir={profile}", url]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", _GUARD, "sh", *command], stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "TMPDIR": self._folder.name},  # Chromium leaves a folder there when it is killed
            )  # fmt: skip

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def log(self) -> str:
        """The last lines that it printed."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])

    def peak_rss_mb(self) -> float:
        """Highest resident memory of each of its processes, added up, in MB (10^6 bytes): pages that they share count in each."""
        import psutil

        from gcvit_edge.targets._worker import peak_rss_mb

        total = 0.0
        for process in self._processes():
            try:
                total += peak_rss_mb(process.pid)
            except (psutil.Error, OSError, StopIteration):  # it ended meanwhile
                continue
        return total

    def close(self) -> None:
        """Ends every process of it and removes the profile."""
        import psutil

        processes = self._processes()
        with suppress(ProcessLookupError):  # also what a launcher has started that has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in processes:  # and what has left the group
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.communicate()
        psutil.wait_procs(processes, timeout=10)
        self._folder.cleanup()

    def _processes(self) -> "list[psutil.Process]":
        import psutil

        try:
            browser = psutil.Process(self._process.pid)
            return [browser, *browser.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
