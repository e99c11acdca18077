"""An Android device: the contract and every failure, on Android's own adbd (of Linux: no bionic, no thermal zones of a phone)."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from boards import Phone, left, need, pids_below, start_adbd, wait_for
from target_contract import check_target

from gcvit_edge.bundle import Bundle
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.native.build import build_runner
from gcvit_edge.targets import Session, adb
from gcvit_edge.targets.adb import Options, connect


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phone]:
    with start_adbd(tmp_path_factory.mktemp("adbd")) as phone:
        yield phone


@pytest.fixture
def phone(started: Phone, monkeypatch: pytest.MonkeyPatch) -> Phone:
    monkeypatch.setenv("ADB_SERVER_SOCKET", started.server)
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    return started


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """The runner of Linux, which adbd here can run."""
    return Options(remote_dir=str(tmp_path / "remote dir"), runner=build_runner().executable)


@contextmanager
def loaded(bundle: Bundle, serial: str, options: Options, **changes: object) -> Iterator[Session]:
    """A session on the device."""
    case = adb.cases(bundle.artifacts, options)[0]
    with connect(serial, replace(options, **changes)) as device, device.open(case, 1, pinned=True) as session:
        yield session


def test_contract(pte_bundle: Bundle, phone: Phone, options: Options, tmp_path: Path) -> None:
    check_target("adb", phone.serials[0], options, pte_bundle, tmp_path)
    assert left(options) == []


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adb").write_text("#!/bin/sh\nexec sleep 20\n")
    (tmp_path / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(adb, "_SERVER_SECONDS", 1)
    with pytest.raises(UserError, match="adb does not answer within 1 s; `adb kill-server`"):
        adb.choose_device("")


def test_which_device(phone: Phone, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"adb knows 2 devices; write one of adb:127\.0\.0\.1:5600, adb:localhost:5600"
    with pytest.raises(UserError, match=message), connect("", options):
        pass
    with pytest.raises(UserError, match="unknown Android device 'localhost'; did you mean 'localhost:5600'"), connect("localhost", options):
        pass
    monkeypatch.setenv("ANDROID_SERIAL", phone.serials[1])
    with connect("", options) as device:
        assert device.machine().cpus == os.cpu_count()


def test_devices_that_are_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    """Their states are what `adb devices` prints; no adbd can be had here that asks for a key."""
    listing = tmp_path / "adb"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    for state, message in {
        "unauthorized": r"Android device R5 is not ready \(unauthorized\); unlock it and allow debugging from this computer",
        "offline": "unplug it and plug it in again",
        "recovery": "restart it, or `adb kill-server`",
    }.items():
        listing.write_text(f"#!/bin/sh\necho 'List of devices attached'\nprintf 'R5\\t{state}\\n'\n")
        listing.chmod(0o755)
        with pytest.raises(UserError, match=message), connect("", options):
            pass
    listing.write_text("#!/bin/sh\necho 'List of devices attached'\n")
    with pytest.raises(UserError, match="adb knows no device; allow USB debugging"), connect("", options):
        pass
    listing.unlink()
    assert "apt-get install adb" in str(adb.missing(""))


def test_the_usual_folder(phone: Phone) -> None:
    if Path("/data").exists() or not os.access("/", os.W_OK):
        pytest.skip("this machine has a folder /data of its own, or does not let one make it")
    Path("/data/local/tmp").mkdir(parents=True)  # as on every phone; only what was made inside is removed again
    try:
        with connect(phone.serials[0], Options()) as device:
            assert list(Path("/data/local/tmp/gcvit-edge").glob("run-*"))
            device.machine()
        assert list(Path("/data/local/tmp").iterdir()) == []
    finally:
        subprocess.run(["rmdir", "-p", "/data/local/tmp"], check=False)


def test_needs_a_runner_for_android(pte_bundle: Bundle, phone: Phone, options: Options) -> None:
    with pytest.raises(UserError, match="--runner"), loaded(pte_bundle, phone.serials[0], options, runner=None):
        pass
    assert left(options) == []


def test_a_folder_that_cannot_be_made(phone: Phone, options: Options) -> None:
    nowhere = replace(options, remote_dir="/proc/nowhere")
    message = r"cannot use 127\.0\.0\.1:5600: .*/proc/nowhere.*; choose a folder"
    with pytest.raises(UserError, match=message), connect(phone.serials[0], nowhere):
        pass


def test_a_device_that_goes_while_it_runs(pte_bundle: Bundle, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pte_bundle.golden_input()[:1]
    with start_adbd(tmp_path) as phone:
        monkeypatch.setenv("ADB_SERVER_SOCKET", phone.server)
        with loaded(pte_bundle, phone.serials[0], options) as session:
            (runner,) = pids_below(Path(str(options.remote_dir)))
            session.time(image, 1)
            threading.Timer(0.5, os.kill, [phone.pid, signal.SIGKILL]).start()
            with pytest.raises(CheckFailed, match=r"does not run in executorch \(the connection to 127\.0\.0\.1:5600 was lost\)"):
                session.time(image, 1_000_000)
        wait_for(lambda: left(options) == [], "nothing is left")
        wait_for(lambda: not Path(f"/proc/{runner}").exists(), "the runner has ended")


def test_a_device_that_goes_between_commands(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_adbd(tmp_path) as phone:
        monkeypatch.setenv("ADB_SERVER_SOCKET", phone.server)
        with connect(phone.serials[0], options) as device:
            os.kill(phone.pid, signal.SIGKILL)
            with pytest.raises(CheckFailed, match=r"the connection to 127\.0\.0\.1:5600 was lost"):
                device.machine()
        wait_for(lambda: left(options) == [], "nothing is left")


def test_a_runner_that_is_killed(pte_bundle: Bundle, phone: Phone, options: Options) -> None:
    with loaded(pte_bundle, phone.serials[0], options) as session:
        (runner,) = pids_below(Path(str(options.remote_dir)))
        os.kill(runner, signal.SIGKILL)
        with pytest.raises(CheckFailed, match=r"\(process was killed, perhaps for want of memory on 127"):
            session.peak_rss_mb()
    assert left(options) == []


def test_a_full_disk(pte_bundle: Bundle, phone: Phone, options: Options, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk], capture_output=True)
    need(mounted.returncode == 0, "the right to mount a tmpfs")
    message = r"(?s)127.*No space left on device.*; make room there, or choose another folder"
    try:
        with pytest.raises(CheckFailed, match=message), loaded(pte_bundle, phone.serials[0], options, remote_dir=str(disk)):
            pass
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
