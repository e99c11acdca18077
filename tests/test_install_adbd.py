"""scripts/install_adbd.sh with an apt-get that downloads from nowhere; packages, and what unpacks them, are real."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from boards import need

SCRIPT = Path(__file__).parents[1] / "scripts" / "install_adbd.sh"
CONTROL = "Package: adbd\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: a file\n"
APT_GET = """\
#!/bin/sh
case "$*" in
    indextargets*) {repositories} ;;
    *install*) cp {folder}/adbd.deb "${{APT_CONFIG%/*}}/cache/archives/"; cp "${{APT_CONFIG%/*}}"/etc/sources.list.d/* {folder}/sources ;;
esac
"""


def install(folder: Path, repositories: str) -> subprocess.CompletedProcess[str]:
    """Runs the script for `folder`/adbd; repositories: the command that prints those of the machine."""
    need(shutil.which("dpkg-deb"), "dpkg-deb")
    package = folder / "package"
    (package / "DEBIAN").mkdir(parents=True)
    (package / "DEBIAN" / "control").write_text(CONTROL)
    (package / "usr").mkdir()
    (package / "usr" / "adbd").write_text("adbd")
    subprocess.run(["dpkg-deb", "--build", package, folder / "adbd.deb"], capture_output=True, check=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "apt-get").write_text(APT_GET.format(repositories=repositories, folder=folder))
    (folder / "bin" / "apt-get").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"}
    return subprocess.run(["bash", SCRIPT, folder / "adbd"], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("after", ["true", "seq -f 'http://example.org/%.0f' 100000"])  # the second fills any pipe
def test_the_first_mirror_of_debian_is_used(tmp_path: Path, after: str) -> None:
    ran = install(
        tmp_path, f"echo http://example.org/ubuntu; echo http://one.example.org/debian/; echo http://two.example.org/debian; {after}"
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "adbd" / "usr" / "adbd").read_text() == "adbd"
    assert "URIs: http://one.example.org/debian/\n" in (tmp_path / "sources").read_text()


def test_without_a_mirror_of_debian_nothing_is_made(tmp_path: Path) -> None:
    assert install(tmp_path, "echo http://example.org/ubuntu").returncode == 1
    assert not (tmp_path / "adbd").exists()
