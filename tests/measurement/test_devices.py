"""Which devices a request means, and that a target is one file: here one is added, with options of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import gcvit_edge.targets
from gcvit_edge.cli import main
from gcvit_edge.errors import UserError
from gcvit_edge.measurement.devices import find_devices

BOARD = """
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gcvit_edge.errors import UserError
from gcvit_edge.targets.local import Local, cases, missing

HELP = "a board; runs everything"
ADDRESS = "required"
MEASURES_TIME = True


@dataclass(frozen=True)
class Options:
    card_dir: str = field(default="/tmp", metadata={"help": "folder on the board"})
    firmware: Path | None = field(default=None, metadata={"help": "a firmware to use"})
    blink: bool = field(default=False, metadata={"help": "blink"})


@contextmanager
def connect(address, options):
    if address == "gone":
        raise UserError("gone does not answer; check its cable")
    yield Local()
"""


@pytest.fixture(autouse=True)
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "board.py").write_text(BOARD)
    monkeypatch.setattr(gcvit_edge.targets, "__path__", [*gcvit_edge.targets.__path__, str(tmp_path / "more")])
    yield
    import sys

    sys.modules.pop("gcvit_edge.targets.board", None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "devices.yaml"
    path.write_text("desk: {target: 'board:pi@desk', threads: 3, card_dir: /data}\nhere: {target: local}\n")
    return path


def test_names_in_the_file_and_targets(file: Path) -> None:
    desk, local = find_devices(["desk", "local"], file, None, {})
    assert (desk.name, desk.target, desk.address, desk.threads, desk.options.card_dir) == ("desk", "board", "pi@desk", 3, "/data")
    assert (local.name, local.target, local.address, local.threads) == ("local", "local", "", None)


def test_the_command_line_goes_before_the_file(file: Path) -> None:
    desk, here = find_devices(["desk", "here"], file, 1, {"card_dir": "/sd"})
    assert (desk.threads, desk.options.card_dir) == (1, "/sd")
    assert here.threads == 1


def test_an_address_may_hold_colons() -> None:
    (device,) = find_devices(["board:[::1]:22"], None, None, {})
    assert device.address == "[::1]:22"
    assert (device.options.card_dir, device.options.firmware) == ("/tmp", None)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["dest"], {}, "unknown device or target 'dest'; did you mean 'desk'?"),
        (["board"], {}, "target 'board' needs an address: board:ADDRESS"),
        (["local:x"], {}, "local takes no address"),
        (["local:"], {}, "ends with a colon"),
        (["local"], {"card_dir": "/sd"}, "--card-dir: none of the targets local has this option"),
    ],
)
def test_requests_that_are_refused(names: list[str], options: dict[str, str], message: str, file: Path) -> None:
    with pytest.raises(UserError) as refused:
        find_devices(names, file, None, options)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("desk: {target: 'board:a', carddir: /sd}", "unknown option of device desk 'carddir'; did you mean 'card_dir'?"),
        ("desk: {target: 'board:a', threads: many}", "device desk: threads: Input should be a valid integer"),
        ("desk: {target: 'board:a', threads: 0}", "threads must be at least 1, got 0"),
        ("desk: {target: 'board:a', blink: [1]}", "device desk: blink: "),
        ("desk: {target: 'board:a', on: 1}", "unknown option of device desk 'True'"),  # which YAML reads so
        ("desk: {target: 'bord:a'}", "unknown target 'bord'; did you mean 'board'?"),
        ("desk: {target: local}\nlocal: {target: 'board:a'}", "gives the name 'local' to a device, but that is a target; give the device"),
        ("desk: {target: local}\n'board:pi': {target: local}", "gives the name 'board:pi' to a device"),
        ("desk: {target: local}\n..: {target: local}", "gives the name '..' to a device, which no folder can have"),
        ("desk: ssh", "is no devices file"),
        ("- desk", "is no devices file"),
        ("a: {b", "cannot read devices file"),
    ],
)
def test_files_that_are_refused(text: str, message: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        find_devices(["desk"], file, None, {})
    assert message in str(refused.value)


def test_every_device_writes_into_a_folder_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "devices.yaml"
    file.write_text("a/b: {target: runner}\ntwin: {target: runner}\n")
    first, second = find_devices(["a/b", "twin"], file, None, {"etdump": tmp_path / "profiles"})
    assert first.options.etdump == tmp_path / "profiles" / "a-b"
    assert second.options.etdump == tmp_path / "profiles" / "twin"
    assert first.options.etdump.is_dir()
    with pytest.raises(
        UserError, match=r"etdump: cannot make folder .*devices\.yaml/runner: Not a directory; give another folder, not a file"
    ):
        find_devices(["runner"], None, None, {"etdump": file})


def test_a_target_that_cannot_be_used_says_what_to_install(tmp_path: Path) -> None:
    changed = BOARD + "\ndef missing(address):\n    return 'the program boardctl is missing; install the package boardctl'\n"
    (tmp_path / "more" / "board.py").write_text(changed)
    with pytest.raises(UserError, match="target 'board' cannot be used here: the program boardctl is missing"):
        find_devices(["board:a"], None, None, {})


def test_options_of_a_target_are_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--card-dir DIR folder on the board (target board)" in shown
    assert "--firmware FIRMWARE a firmware to use (target board)" in shown
    assert "--blink blink (target board)" in shown
    assert " board, " in shown
    assert "(some take :ADDRESS)" in shown
    assert "--etdump" in shown
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert "--etdump" not in capsys.readouterr().out  # nothing is timed
