"""A board by SSH: the contract and every failure, on a real sshd."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from boards import Board, left, need, pids_below, start_sshd, wait_for
from PIL import Image
from target_contract import check_target

from gcvit_edge.backends.executorch import read_etdump
from gcvit_edge.bundle import Bundle
from gcvit_edge.cli import main
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.measurement.devices import Device
from gcvit_edge.measurement.measure import evaluate_bundle
from gcvit_edge.progress import Steps
from gcvit_edge.targets import Session, _shell, ssh
from gcvit_edge.targets._remote import Remote
from gcvit_edge.targets.ssh import Options, connect


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    with start_sshd(tmp_path_factory.mktemp("sshd")) as board:
        yield board


@pytest.fixture
def options(board: Board, tmp_path: Path) -> Options:
    return Options(remote_dir=str(tmp_path / "remote dir"), ssh_config=board.config)


@contextmanager
def loaded(bundle: Bundle, options: Options, **changes: object) -> Iterator[Session]:
    """A session on the board."""
    case = ssh.cases(bundle.artifacts, options)[0]
    with connect("board", replace(options, **changes)) as device, device.open(case, 1, pinned=True) as session:
        yield session


def test_contract(pte_bundle: Bundle, options: Options, tmp_path: Path) -> None:
    check_target("ssh", "board", options, pte_bundle, tmp_path)
    assert left(options) == []


def test_sent_once(pte_bundle: Bundle, options: Options, board: Board) -> None:
    case = ssh.cases(pte_bundle.artifacts, options)[0]
    image = pte_bundle.golden_input()[:1]
    with connect("board", options) as device, device.open(case, 1, pinned=False) as one, device.open(case, 1, pinned=False) as other:
        assert len(board.connections()) == 1
        one.time(image, 1)
        other.time(image.copy(), 1)
        names = [file.name for file in left(options)]
        assert [name.endswith(".f32") for name in names].count(True) == 1
        assert names.count(case.artifact.path.name) == 1
        other.infer(pte_bundle.golden_input(), lambda: None)
        one.close()
        assert [file.name.endswith(".f32") for file in left(options)].count(True) == 2  # the input that `other` holds, and its logits
    assert left(options) == []


def test_images_are_sent_once_for_all_artifacts(
    pte_bundle: Bundle, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images" / pte_bundle.info.labels.folders[0]
    folder.mkdir(parents=True)
    monkeypatch.setattr("gcvit_edge.targets.CHUNK_BYTES", 4 * 4 * 3 * 64 * 64)
    for index in range(5):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(folder / f"{index}.png")
    sent: list[str] = []
    send, cases = _shell.Shell.send, ssh.cases

    def counted(shell: _shell.Shell, content: bytes, path: str) -> None:
        sent.append(path)
        send(shell, content, path)

    monkeypatch.setattr(_shell.Shell, "send", counted)
    monkeypatch.setattr(ssh, "cases", lambda artifacts, options: 2 * cases(artifacts, options))
    (run,) = evaluate_bundle(pte_bundle, [Device("board", "ssh", "board", options, 1)], tmp_path / "images", Steps()).runs
    assert [result.accuracy and result.accuracy.images for result in run.results] == [5] * 2
    assert run.results[0].accuracy == run.results[1].accuracy
    assert len([path for path in sent if path.endswith(".f32")]) == 3  # two parts, and the golden input
    assert left(options) == []


def test_files_kept_by_hash(pte_bundle: Bundle, options: Options) -> None:
    keep = replace(options, keep_files=True)
    case = ssh.cases(pte_bundle.artifacts, keep)[0]

    def run() -> dict[str, int]:
        with connect("board", keep) as device, device.open(case, 1, pinned=False):
            pass
        return {file.name: file.stat().st_mtime_ns for file in left(keep) if file.is_file()}

    first = run()
    assert case.artifact.path.name in first
    assert len(first) > 2  # runner and libraries
    assert run() == first
    model = next(file for file in left(keep) if file.name == case.artifact.path.name)
    model.write_bytes(b"damaged")
    assert run()[case.artifact.path.name] > first[case.artifact.path.name]
    assert model.read_bytes() == case.artifact.path.read_bytes()


def test_another_command_keeps_the_same_files_meanwhile(pte_bundle: Bundle, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = replace(options, keep_files=True)
    case, run = ssh.cases(pte_bundle.artifacts, keep)[0], _shell.Shell.run

    def late(shell: _shell.Shell, script: str, *rest: Any, **more: Any) -> bytes:
        if " mv " in script:
            words = shlex.split(script)
            folder = Path(words[words.index("-d") + 1])
            shutil.copytree(next(folder.parent.glob("run-*/incoming")), folder)
            for file in folder.rglob("*"):
                file.chmod(0o700)
        return run(shell, script, *rest, **more)

    monkeypatch.setattr(_shell.Shell, "run", late)
    with connect("board", keep) as device, device.open(case, 1, pinned=False) as session:
        session.infer(pte_bundle.golden_input(), lambda: None)
    assert not [file for file in left(keep) if file.name == "incoming"]


def test_leftovers_of_a_board_that_lost_power(options: Options) -> None:
    old = Path(str(options.remote_dir)) / "gcvit-edge" / f"run-{os.getpid()}-another-start@{os.uname().nodename}"
    (old / "1").mkdir(parents=True)
    with connect("board", options), connect("board", options):
        assert not old.exists()
        assert len(list(old.parent.glob("run-*"))) == 2  # of those that live, neither removes the other's
    assert left(options) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"IdentityFile": "{folder}/other"}, "Permission denied.*; a key must let you in without a password: ssh-copy-id board"),
        ({"UserKnownHostsFile": "/dev/null"}, "Host key verification failed.*; its key is not known; connect once by hand, ssh board"),
        ({"UserKnownHostsFile": "{folder}/wrong_hosts"}, "(?s)HAS CHANGED.*its key is another than last time"),
        ({"Port": "{closed}"}, "Connection refused.*; it is there, but has no SSH server on this port"),
        ({"HostName": "board.invalid"}, "Could not resolve.*; check the name"),
        ({"ProxyCommand": "sleep 30"}, "timed out.*; is it switched on, and in this network"),
    ],
)
def test_not_let_in(change: dict[str, str], message: str, board: Board, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CONNECT_SECONDS", 1)
    name = (board.folder / "known_hosts").read_text().split()[0]
    (board.folder / "wrong_hosts").write_text(f"{name} {(board.folder / 'other.pub').read_text()}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = free.getsockname()[1]
    config = board.configure(**{name: value.format(folder=board.folder, closed=closed) for name, value in change.items()})
    with pytest.raises(UserError, match=message), connect("board", replace(options, ssh_config=config)):
        pass


def test_a_command_of_the_users_own_after_connecting(board: Board, options: Options) -> None:
    """What it prints is not said by the board."""
    config = board.configure(PermitLocalCommand="yes", LocalCommand="echo connected")
    with connect("board", replace(options, ssh_config=config)) as device:
        assert device.machine().cpus >= 1


def test_a_folder_for_temporary_files_with_a_percent_sign(options: Options, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / "5%x").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary / "5%x"))
    with connect("board", options) as device:
        assert device.machine().cpus >= 1


def test_an_option_is_no_address(options: Options) -> None:
    with pytest.raises(UserError, match="not an option of ssh"), connect("-oProxyCommand=true", options):
        pass


def test_a_shell_that_talks(board: Board, options: Options) -> None:
    forced = board.folder / "authorized_keys"
    usual = forced.read_text()
    forced.write_text(f'command="echo Welcome; $SSH_ORIGINAL_COMMAND" {usual}')
    try:
        message = "board says 'Welcome' before any command; its login shell must print nothing"
        with pytest.raises(UserError, match=message), connect("board", options):
            pass
    finally:
        forced.write_text(usual)


@pytest.mark.parametrize("folder", [None, "work"])
def test_a_login_shell_that_says_where_it_goes(folder: str | None, board: Board, options: Options) -> None:
    """With CDPATH, as start-up files set it, `cd` prints the folder."""
    forced = board.folder / "authorized_keys"
    usual = forced.read_text()
    forced.write_text(f'command="export CDPATH=.:~; eval \\"$SSH_ORIGINAL_COMMAND\\"" {usual}')
    try:
        with connect("board", replace(options, remote_dir=folder or options.remote_dir)) as device:
            assert isinstance(device, Remote)
            assert device.shell.run("cd / && pwd") == b"/\n"
    finally:
        forced.write_text(usual)


@pytest.mark.parametrize("shell", ["sh", "tcsh"])
def test_any_login_shell(shell: str, board: Board, options: Options) -> None:
    need(shutil.which(shell), shell)
    forced = board.folder / "authorized_keys"
    usual = forced.read_text()
    forced.write_text(f'command="exec {shell} -c \\"$SSH_ORIGINAL_COMMAND\\"" {usual}')
    script = """
# a comment
echo "it's 100%: $((1 + 1)) \\0101 é!" != '\\'
cat"""
    try:
        with connect("board", options) as device:
            assert isinstance(device, Remote)
            here = subprocess.run(["sh", "-c", script], input=b"in", capture_output=True, check=True)
            assert device.shell.run(script, b"in") == here.stdout
    finally:
        forced.write_text(usual)
    assert left(options) == []


@pytest.mark.parametrize("folder", ["~", "~/my bench"])
def test_the_home_folder(folder: str, board: Board, options: Options) -> None:
    with connect("board", replace(options, remote_dir=folder)) as device:
        assert isinstance(device, Remote)
        # the folder of the board is the home folder of who logs in
        assert Path(device.keeper.folder).parent == Path(folder.replace("~", str(board.folder))) / "gcvit-edge"
        assert Path(device.keeper.folder).is_dir()
    assert not (board.folder / "gcvit-edge").exists()


def test_a_folder_that_cannot_be_told(options: Options) -> None:
    for folder in ("a\tb", "~/a\tb", "~/a\nb"):
        with pytest.raises(UserError, match=r"remote_dir: got '.*', but a tab"), connect("board", replace(options, remote_dir=folder)):
            pass


def test_the_home_folder_of_another_user(options: Options) -> None:
    message = "remote_dir: got ~pi/bench, but ~ is only the home folder of the user who logs in; give the whole path"
    with pytest.raises(UserError, match=message), connect("board", replace(options, remote_dir="~pi/bench")):
        pass


def test_a_folder_that_cannot_be_made(options: Options) -> None:
    nowhere = replace(options, remote_dir="/proc/nowhere")
    message = r"cannot use board: .*/proc/nowhere.*; choose a folder that you may write to with --remote-dir"
    with pytest.raises(UserError, match=message), connect("board", nowhere):
        pass


def test_what_helps() -> None:
    shell = ssh.Ssh("pi@board", None, Path("socket"))
    refused = "mkdir: cannot create directory '/opt/gcvit-edge': Permission denied"
    assert shell.refusal(refused) == "choose a folder that you may write to with --remote-dir"
    others = "sh: 12: cd: can't cd to /tmp/gcvit-edge"  # made there by another user
    assert shell.refusal(others) == "choose a folder that you may write to with --remote-dir"
    assert "ssh-copy-id pi@board" in shell.refusal("pi@board: Permission denied (publickey,password).")


def test_a_configuration_that_is_not_there(options: Options, tmp_path: Path) -> None:
    said = pytest.raises(UserError, match="No such file or directory; check --ssh-config")
    with said, connect("board", replace(options, ssh_config=tmp_path / "none")):
        pass


def test_a_connection_that_breaks_while_it_runs(pte_bundle: Bundle, options: Options, board: Board) -> None:
    image = pte_bundle.golden_input()[:1]
    with loaded(pte_bundle, options) as session:
        (runner,) = running(options)
        session.time(image, 1)
        threading.Timer(0.5, cut, [board]).start()
        with pytest.raises(CheckFailed, match=r"model\.float\.pte does not run in executorch \(the connection to board was lost\)"):
            session.time(image, 1_000_000)
    wait_for(lambda: left(options) == [], "nothing is left")
    wait_for(lambda: not Path(f"/proc/{runner}").exists(), "the runner has ended")


def test_a_network_that_is_lost_without_a_word(pte_bundle: Bundle, options: Options, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sshd does not know it either, so nothing ends there by itself."""
    monkeypatch.setattr(_shell, "BEAT_SECONDS", 1)
    monkeypatch.setattr(_shell, "SILENT_BEATS", 4)
    monkeypatch.setattr(_shell, "_START_SECONDS", 1)  # to end the connection, which nobody answers
    image = pte_bundle.golden_input()[:1]
    connections: list[int] = []
    try:
        with loaded(pte_bundle, options) as session:
            (runner,) = running(options)
            session.time(image, 1)
            connections = board.processes()
            for pid in connections:
                os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: not Path(f"/proc/{runner}").exists() and left(options) == [], "nothing is left", 30)
            with pytest.raises(CheckFailed, match="the connection to board was lost"):
                session.time(image, 1)
    finally:
        for pid in connections:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_connection_that_breaks_while_it_sends(pte_bundle: Bundle, options: Options, board: Board) -> None:
    case = ssh.cases(pte_bundle.artifacts, options)[0]
    with connect("board", options) as device:
        cut(board)
        with pytest.raises(CheckFailed, match="the connection to board was lost"):
            device.open(case, 1, pinned=False)
    wait_for(lambda: left(options) == [], "nothing is left")


def test_a_runner_that_is_killed(pte_bundle: Bundle, options: Options) -> None:
    with loaded(pte_bundle, options) as session:
        (runner,) = running(options)
        os.kill(runner, signal.SIGKILL)
        with pytest.raises(CheckFailed, match=r"\(process was killed, perhaps for want of memory on board\)"):
            session.peak_rss_mb()
    assert left(options) == []


def test_this_program_killed(pte_bundle: Bundle, options: Options, temporary: Path) -> None:
    """By SIGKILL, so that it can do nothing itself: its own temporary folder stays."""
    case = f"benchmark {pte_bundle.root} --target ssh:board --backend executorch --mode single-stream".split()
    with subprocess.Popen(
        [sys.executable, "-m", "gcvit_edge", *case, "--ssh-config", str(options.ssh_config), "--remote-dir", str(options.remote_dir)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as program:  # fmt: skip
        wait_for(lambda: len(running(options)) == 1, "the runner runs", 60)
        program.kill()
    wait_for(lambda: running(options) == [], "the runner has ended")
    wait_for(lambda: left(options) == [], "nothing is left")


def test_a_full_disk(pte_bundle: Bundle, options: Options, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk], capture_output=True)
    need(mounted.returncode == 0, "the right to mount a tmpfs")
    message = r"(?s)board: .*No space left on device; make room there, or choose another folder with --remote-dir"
    try:
        with pytest.raises(CheckFailed, match=message), loaded(pte_bundle, options, remote_dir=str(disk)):
            pass
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_runner_of_another_architecture(pte_bundle: Bundle, options: Options, tmp_path: Path) -> None:
    runner = tmp_path / "runner"
    runner.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xf3\x00" + bytes(44))
    message = r"runner .*/runner is built for riscv64, but board is \w+"
    with pytest.raises(UserError, match=message), loaded(pte_bundle, options, runner=runner):
        pass
    assert left(options) == []


def test_a_runner_that_is_a_script(pte_bundle: Bundle, options: Options, tmp_path: Path) -> None:
    """What it has started, and waits for, ends too."""
    runner = tmp_path / "runner"
    runner.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path}/started\nwait\n")
    with pytest.raises(CheckFailed, match="no answer within 2 s"), loaded(pte_bundle, options, runner=runner, timeout=2):
        pass
    started = (tmp_path / "started").read_text().strip()
    wait_for(lambda: not Path("/proc", started).exists(), "what the script started has ended")
    assert left(options) == []


def test_a_runner_that_cannot_start(pte_bundle: Bundle, options: Options, tmp_path: Path) -> None:
    runner = tmp_path / "runner"
    runner.write_text("#!/no/such/loader\n")
    message = "board cannot start the runner, which needs a 64-bit system"
    with pytest.raises(CheckFailed, match=message), loaded(pte_bundle, options, runner=runner):
        pass
    runner.write_text('#!/bin/sh\necho "libc.so.6: version \\`GLIBC_2.99\' not found" >&2; exit 1\n')
    with pytest.raises(CheckFailed, match=rf"{message}(.|\n)*GLIBC_2\.99"), loaded(pte_bundle, options, runner=runner):
        pass
    message = r"cannot read runner .*/none: No such file"
    with pytest.raises(UserError, match=message), loaded(pte_bundle, options, runner=tmp_path / "none"):
        pass
    assert left(options) == []


def test_command_line(pte_bundle: Bundle, options: Options, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--ssh-config", str(options.ssh_config), "--remote-dir", str(options.remote_dir), "--backend", "executorch"]
    assert main(["benchmark", str(pte_bundle.root), "--target", "ssh:board", *words]) == 0
    assert "ssh:board" in capfd.readouterr().out
    assert left(options) == []


def test_profiles_are_fetched(pte_bundle: Bundle, options: Options, tmp_path: Path) -> None:
    dumping = replace(options, etdump=tmp_path / "profiles")
    image = pte_bundle.golden_input()[:1]
    with loaded(pte_bundle, dumping) as session:
        session.infer(image, lambda: None)
    assert not (tmp_path / "profiles").exists()  # nothing was timed
    with loaded(pte_bundle, dumping) as session:
        session.time(image, 2)
    operators, calls = read_etdump(tmp_path / "profiles" / "model.float.etdump")
    assert calls == 1
    assert any(each.kind == "matrix" and each.ms > 0 for each in operators)
    assert left(options) == []


def cut(board: Board) -> None:
    """Ends the connections to the board from there, as if the network were gone."""
    for pid in board.processes():
        with suppress(ProcessLookupError):  # one ends the other
            os.kill(pid, signal.SIGKILL)


def running(options: Options) -> list[int]:
    """Process numbers of runners in the folder."""
    return pids_below(Path(str(options.remote_dir)))
