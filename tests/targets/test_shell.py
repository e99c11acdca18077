"""The keeper of a folder, in the shells that devices have: whose leftovers it removes."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from shlex import quote

import pytest
from boards import need, wait_for

from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.targets import _shell
from gcvit_edge.targets._shell import Keeper, Shell

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
HOST = os.uname().nodename
SHELLS = ("sh", "mksh", "busybox sh")  # the second is Android's, the third that of many small boards


class Here(Shell):
    """A shell of this machine. first: what it runs before the keeper, in the same process."""

    name = "here"

    def __init__(self, shell: str, first: str = ":") -> None:
        need(shutil.which(shell.split()[0]), shell)
        self.shell, self.first = shell.split(), first

    def command(self, script: str) -> list[str]:
        return [*self.shell, "-c", f"{self.first}\n{script}"]

    def refusal(self, printed: str) -> str:
        return "no advice"


def ended() -> int:
    """The number of a process that is no more."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    return gone.pid


def test_a_last_word_after_the_end_of_a_script() -> None:
    class Wrapped(Here):
        def command(self, script: str) -> list[str]:
            return ["sh", "-c", f"sh -c {quote(script)}; echo goodbye >&2"]

    shell = Wrapped("sh")
    assert shell.run("echo fine; echo careful >&2") == b"fine\n"
    with pytest.raises(CheckFailed, match=r"here: no such thing$"):
        shell.run("echo no such thing >&2; exit 3")
    with pytest.raises(CheckFailed, match=r"the connection to here was lost: (?s:.*)goodbye"):
        shell.run("kill -9 $$")


@pytest.mark.parametrize("shell", SHELLS)
def test_which_leftovers_are_removed(shell: str, tmp_path: Path) -> None:
    folder = tmp_path / "gcvit-edge"
    removed = [f"run-{ended()}-{BOOT}@{HOST}", f"run-{os.getpid()}-another-start@{HOST}", f"run-{os.getpid()}-@{HOST}"]
    kept = [f"run-{os.getpid()}-{BOOT}@{HOST}", f"run-{ended()}-{BOOT}@another-{HOST}", f"run-{ended()}-another-start@{HOST}-2", "0a1b"]
    for name in (*removed, *kept):
        (folder / name / "1").mkdir(parents=True)
    keeper = Keeper(Here(shell), str(tmp_path))
    try:
        assert {file.name for file in folder.iterdir()} == {*kept, Path(keeper.folder).name}
    finally:
        keeper.close()
    assert {file.name for file in folder.iterdir()} == set(kept)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_leftover_with_the_number_of_the_new_keeper(shell: str, tmp_path: Path) -> None:
    Keeper(Here(shell, f"cd {tmp_path}; mkdir -p gcvit-edge/run-$$-{BOOT}@{HOST}/1"), str(tmp_path)).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_another_keeper_removes_the_empty_folder_meanwhile(shell: str, tmp_path: Path) -> None:
    """As each does at its end: between two steps of the new one, and so twice."""
    folder, seen = tmp_path / "gcvit-edge", tmp_path / "seen"
    removed = f"[ $(wc -l < {seen}) -gt 1 ] || {{ rmdir {folder}; echo >> {seen}; }}"
    first = f': > {seen}; mkdir() {{ case "$1" in run-*) {removed};; esac; command mkdir "$@"; }}'
    keeper = Keeper(Here(shell, first), str(tmp_path))
    assert Path(keeper.folder).is_dir()
    keeper.close()
    assert seen.read_text() == "\n\n"
    assert list(tmp_path.iterdir()) == [seen]


def test_what_programs_say_in_the_language_of_the_user(tmp_path: Path) -> None:
    """They are asked for English, by which it is known what they say."""
    said = 'echo "mkdir: $([ "$LC_ALL" = C ] && echo No space left on device || echo Kein Speicherplatz)" >&2'
    with pytest.raises(CheckFailed, match=r"No space left on device; make room there"):
        Keeper(Here("sh", f"LC_ALL=de_DE.UTF-8; export LC_ALL; mkdir() {{ {said}; return 1; }}"), str(tmp_path))
    assert Here("sh", "LC_ALL=de_DE.UTF-8; export LC_ALL").run("env | grep ^LC_ALL=") == b"LC_ALL=C\n"


@pytest.mark.parametrize("script", ["exec cat /dev/zero", "while :; do printf x; sleep 0.1; done"])
def test_a_device_that_does_not_stop_talking(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shell, "_START_SECONDS", 1)
    with pytest.raises(UserError, match=r"here says '.{1,1000}' before any command"):
        Keeper(Here("sh", script), str(tmp_path))


def test_an_interruption_before_the_first_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> bool:
        wait_for(lambda: (tmp_path / "pid").exists(), "the shell runs")
        raise KeyboardInterrupt

    monkeypatch.setattr(_shell, "readable", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Keeper(Here("sh", f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 60"), str(tmp_path))
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_a_prompt_instead_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no end of line to wait for."""
    monkeypatch.setattr(_shell, "_START_SECONDS", 1)
    with pytest.raises(UserError, match=r"here says 'router> ' before any command"):
        Keeper(Here("sh", "printf 'router> '; exec sleep 30"), str(tmp_path))


@pytest.mark.parametrize("shell", SHELLS)
def test_folders_made_on_the_way_are_gone(shell: str, tmp_path: Path) -> None:
    keeper = Keeper(Here(shell), quote(f"{tmp_path}/deep/er folder/"))
    assert Path(keeper.folder).parents[1] == tmp_path / "deep" / "er folder"
    keeper.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_a_connection_that_falls_silent(shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing ends it: the network is gone, or this machine."""
    monkeypatch.setattr(_shell, "BEAT_SECONDS", 1)
    monkeypatch.setattr(_shell, "SILENT_BEATS", 3)
    keeper = Keeper(Here(shell), str(tmp_path))
    program = subprocess.Popen(["sleep", "60"])
    try:
        session = Path(keeper.folder, "1")
        session.mkdir()
        (session / "pid").write_text(str(program.pid))
        time.sleep(5)
        assert program.poll() is None
        keeper._ended.set()  # this side is silent now
        assert program.wait(10) == -signal.SIGKILL
        wait_for(lambda: list(tmp_path.iterdir()) == [], "nothing is left")
    finally:
        program.kill()
        program.wait()
        keeper.close()
