"""The keeper of a folder, in the shells that devices have: whose leftovers it removes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gcvit_edge.targets._shell import Keeper, Shell

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
HOST = os.uname().nodename
SHELLS = [shell for shell in ("sh", "mksh", "busybox sh") if shutil.which(shell.split()[0])]


class Here(Shell):
    """A shell of this machine. first: what it runs before the keeper, in the same process."""

    name = "here"

    def __init__(self, shell: str, first: str = ":") -> None:
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
