"""The browser: what its page may ask for, what happens when it fails, and that nothing is left of it."""

import hashlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from boards import need
from quantized import IMAGES
from target_contract import check_target

from gcvit_edge.artifact import Artifact
from gcvit_edge.bundle import Bundle
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.targets import Case, local, web
from gcvit_edge.targets.web import _runtime
from gcvit_edge.targets.web._browser import Browser, browser_version, find_browser
from gcvit_edge.targets.web._server import GONE, PageServer


@pytest.fixture(scope="module")
def usable() -> None:
    missing = web.missing("")
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    (tmp_path / "page.js").write_text("run()")
    server = PageServer({"page.js": tmp_path / "page.js"})
    yield server
    server.close()


def program(path: Path, script: str, version: str = "Chromium 1.2.3") -> str:
    """A browser that is a shell script."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\n{script}\n')
    path.chmod(0o755)
    return str(path)


def open_in(browser: str, bundle: Bundle, timeout: int) -> str:
    """What is said when the ONNX model cannot be loaded in that browser."""
    with web.connect(browser, web.Options(timeout=timeout)) as connection, pytest.raises(CheckFailed) as failed:
        connection.open(Case(bundle.artifact("onnx"), "wasm"), 1, pinned=False)
    return str(failed.value)


def get(server: PageServer, name: str) -> bytes:
    with urllib.request.urlopen(server.url.replace("page.html", name), timeout=5) as response:
        assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        return response.read()


def test_what_the_server_gives(server: PageServer) -> None:
    server.images = np.arange(12, dtype="<f4").reshape(2, 3, 2, 1)
    assert get(server, "page.js") == b"run()"
    np.testing.assert_array_equal(np.frombuffer(get(server, "images/1"), "<f4"), np.arange(6, 12))
    for name in ("images/2", "images/x", "other", "../page.js"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(server, name)


def test_only_the_page_knows_the_address(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    stranger = server.url.replace(server.token, "guessed")
    for data in (None, b"{}"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(stranger.replace("page.html", "page.js" if data is None else "answer"), data, timeout=5)
    assert server.answers.empty()


@pytest.mark.parametrize(("token", "size", "code"), [("guessed", 10**9, 404), (None, 10**9, 413), (None, -1, 413)])
def test_what_is_posted_is_not_read_unless_it_may_be(token: str | None, size: int, code: int, server: PageServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
        head = f"POST /{token or server.token}/answer HTTP/1.0\r\nContent-Length: {size}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.makefile("rb").readline().startswith(f"HTTP/1.0 {code}".encode())
    assert server.answers.empty()


def test_a_page_that_goes_is_noticed(server: PageServer) -> None:
    response = urllib.request.urlopen(server.url.replace("page.html", "commands"), timeout=5)
    server.commands.put(("load", {}))
    assert response.readline() == b'data: ["load", {}]\n'
    response.close()
    assert server.answers.get(timeout=10) == {"error": GONE}


def test_browsers_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="browser 'netscape' is not on PATH"):
        find_browser("netscape")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no browser on PATH \(looked for chromium, .*apt install chromium"):
        find_browser("")
    assert "apt install chromium" in str(web.missing(""))
    assert "browser 'netscape'" in str(web.missing("netscape"))
    # one that is none of the usual ones may be given
    assert web.missing(program(tmp_path / "greeter", "", version="hello")) == _runtime.missing_runtime()
    with pytest.raises(UserError, match="--version says 'hello'"):
        browser_version(program(tmp_path / "greeter", "", version="hello"))


def test_a_timeout_must_be_positive() -> None:
    with pytest.raises(UserError, match="timeout must be at least 1 second, got 0"), web.connect("", web.Options(timeout=0)):
        pass


@pytest.mark.parametrize("kind", ["link", "script"])
def test_ubuntus_firefox(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    firefox = tmp_path / "firefox"
    if kind == "link":
        firefox.symlink_to(program(tmp_path / "snap", "true"))
    else:
        program(firefox, "exec /snap/bin/firefox")
    for name in (str(firefox), ""):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match=r"firefox is a snap, which sees no profile but those in its own folder"):
            find_browser(name)
    program(tmp_path / "firefox-esr", "true")
    assert find_browser("") == str(tmp_path / "firefox-esr")


def test_a_browser_that_ends(usable: None, bundle: Bundle, tmp_path: Path) -> None:
    said = open_in(program(tmp_path / "broken", "echo no display >&2; exit 3"), bundle, 20)
    assert said.startswith("model.float.onnx does not run in Chromium 1.2.3: the browser ended with 3")
    assert said.endswith("no display")


def test_a_page_that_never_answers(usable: None, bundle: Bundle, tmp_path: Path) -> None:
    said = open_in(program(tmp_path / "silent", "sleep 60"), bundle, 1)
    assert "the page did not answer within 1 s; give it longer with --timeout, or try another browser as web:BROWSER" in said


def group_ends(group: int) -> bool:
    """Whether no process of the group is left, soon."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_launcher_that_ends_before_the_browser(tmp_path: Path) -> None:
    browser = Browser(program(tmp_path / "launcher", "sleep 321 & exit 3"), "http://127.0.0.1:9")
    while browser.exit_code is None:
        time.sleep(0.02)
    browser.close()
    assert browser.exit_code == 3
    assert group_ends(browser._process.pid)


def test_no_browser_outlives_this_program(tmp_path: Path, temporary: Path) -> None:
    script = (
        "import sys, time\nfrom gcvit_edge.targets.web._browser import Browser\n"
        "browser = Browser(sys.argv[1], 'http://127.0.0.1:9')\nprint(browser._process.pid, flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", script, program(tmp_path / "browser", "sleep 321 & sleep 322")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout
        group = int(user.stdout.readline())
        os.killpg(group, 0)
        user.kill()
    assert group_ends(group)


def test_a_tab_that_crashes(usable: None, bundle: Bundle, temporary: Path) -> None:
    with web.connect("", web.Options(timeout=30)) as connection:
        session = connection.open(Case(bundle.artifact("onnx"), "wasm"), 1, pinned=False)
        with session:
            processes = session._browser._processes()  # type: ignore[attr-defined]
            tabs = [p for p in processes if {"--type=renderer", "-contentproc"} & set(p.cmdline())]
            assert tabs
            for tab in tabs:
                tab.send_signal(signal.SIGKILL)
            with pytest.raises(CheckFailed, match="the page is gone"):
                session.time(bundle.golden_input()[:1], 1)
        assert not [p for p in processes if psutil.pid_exists(p.pid) and p.status() != psutil.STATUS_ZOMBIE]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("recipe", "usual"), [("int8_ptq", 60), ("int4_weights", 60), ("w4a8_ptq", 30)])
def test_integers_give_what_the_native_runtime_gives(
    usable: None, quantized: Callable[[str, str], Artifact], recipe: str, usual: float
) -> None:
    """Sums in another order may round one value of an image to another integer; a wrong kernel shows in all images."""
    artifact = quantized(recipe, "onnx")
    with (
        web.connect("", web.Options()) as browser,
        browser.open(Case(artifact, "wasm"), 2, pinned=False) as page,
        local.Session(artifact, 1) as native,
    ):
        there, here = page.infer(IMAGES, lambda: None), native.infer(IMAGES, lambda: None)
    assert sqnr_db(there, here) > 30
    assert np.median([sqnr_db(there[[index]], here[[index]]) for index in range(len(IMAGES))]) > usual


def test_an_error_in_the_page_is_told(usable: None, bundle: Bundle) -> None:
    with web.connect("", web.Options()) as connection, connection.open(Case(bundle.artifact("onnx"), "wasm"), 2, pinned=False) as session:
        assert session.runtime_version == _runtime.VERSION
        with pytest.raises(CheckFailed, match=r"model\.float\.onnx does not run in .*: .*dimension"):
            session.infer(np.zeros((1, 3, 7, 7), np.float32), lambda: None)


@pytest.mark.slow
def test_contract_in_firefox(usable: None, bundle: Bundle, tmp_path: Path) -> None:
    firefox = shutil.which("firefox") or shutil.which("firefox-esr")
    need(firefox, "Firefox: apt-get install firefox-esr")
    assert firefox
    check_target("web", firefox, web.Options(), bundle, tmp_path)


def test_the_runtime_is_fetched_only_when_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "fetch it (33 MB, by npm) with `python -m gcvit_edge.targets.web`" in (_runtime.missing_runtime() or "")
    for path in _runtime.runtime_files().values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"changed")
    assert "expected 11e64bd8ffe1...; fetch it again" in (_runtime.missing_runtime() or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is not on PATH"):
        _runtime.fetch_runtime()


def test_another_package_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "package.tgz"
    with tarfile.open(package, "w:gz") as archive:
        for name in _runtime._FILES:
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"evil"))
    with pytest.raises(UserError, match=f"has sha256 {hashlib.sha256(b'evil').hexdigest()[:12]}.*do not use it"):
        _runtime.unpack(package)
    package.write_bytes(b"no archive")
    with pytest.raises(UserError, match="is no package of onnxruntime-web"):
        _runtime.unpack(package)
