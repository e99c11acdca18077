"""Starting: nothing heavy is loaded, help teaches, bad usage is exit 2; recipes and doctor."""

import errno
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from commands import Command, gcvit

from gcvit_edge.cli import Result, main
from gcvit_edge.interruption import interrupted
from gcvit_edge.progress import Steps
from gcvit_edge.recipe import recipe_text

VERBS = (
    "analyze", "benchmark", "build-runner", "convert", "doctor", "evaluate", "export", "predict", "profile", "quantize", "recipes", "train",
    "verify",
)  # fmt: skip
HEAVY = ("torch", "torchvision", "torchao", "onnx", "onnxruntime", "openvino", "nncf", "executorch", "scipy", "pandas", "PIL", "numpy")


SWITCHES = ("ORT_DISABLE_TELEMETRY", "NNCF_CI", "HF_HUB_DISABLE_TELEMETRY", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python, whose environment has of what the package sets only what is given."""
    clean = {key: value for key, value in os.environ.items() if key not in SWITCHES}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=clean | environment)


def python(code: str, **environment: str) -> str:
    return process(code, **environment).stdout.strip()


def test_parser_loads_nothing_heavy() -> None:
    code = f"import sys, gcvit_edge.cli; gcvit_edge.cli.build_parser(); print([n for n in {HEAVY!r} if n in sys.modules])"
    assert python(code) == "[]"


def test_import_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import gcvit_edge; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.5


def test_import_switches_telemetry_off() -> None:
    code = (
        "import os, sys, gcvit_edge; print(*(os.environ.get(k) for k in "
        "('ORT_DISABLE_TELEMETRY', 'NNCF_CI', 'HF_HUB_DISABLE_TELEMETRY')), sys.modules['openvino_telemetry'])"
    )
    assert python(code) == "1 1 1 None"
    assert python(code, HF_HUB_DISABLE_TELEMETRY="0") == "1 1 0 None"  # who sets it decides


@pytest.mark.parametrize(("environment", "count"), [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")])
def test_threads_that_wait_sleep_soon(environment: dict[str, str], count: str) -> None:
    """As libgomp, which PyTorch brings, says that it has read it."""
    code = (
        "import sys; from contextlib import suppress; from gcvit_edge.cli import entry_point; sys.argv = ['', 'recipes', 'list']\n"
        "with suppress(SystemExit): entry_point()\n"
        "import torch"
    )
    assert f"GOMP_SPINCOUNT = '{count}'" in process(code, OMP_DISPLAY_ENV="VERBOSE", **environment).stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: gcvit-edge {verb}")
    assert "--json" in shown
    assert "exit codes:" in shown


def test_help_lists_the_verbs_and_version(tmp_path: Path) -> None:
    shown = gcvit("--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert all(f"\n    {verb}" in shown.stdout for verb in VERBS)
    assert gcvit("--version", cwd=tmp_path).stdout.startswith("gcvit-edge ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [[], ["quantise"], ["quantize", "--bogus"], ["predict"], ["quantize", "--threads", "two"]])
def test_bad_usage_is_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert "usage: gcvit-edge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["quantize", "--recipie", "int8_ptq"], "unrecognized arguments: --recipie int8_ptq; did you mean --recipe?"),
        (
            ["benchmark", "bundle", "--target=local", "--thread=2", "--modes=quick"],
            "unrecognized arguments: --modes=quick; did you mean --mode?",
        ),
        (["predict", "bundle", "a.jpg", "--zzzzqqq"], "unrecognized arguments: --zzzzqqq"),
        (["verify", "bundle", "another"], "unrecognized arguments: another"),
        (["convert", "-o", "a.safetensors"], "the following arguments are required: --weights"),
        (["recipes"], "the following arguments are required: list|show"),
    ],
)
def test_wrong_options_are_told_by_their_verb(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert capsys.readouterr().err.splitlines()[-1] == f"gcvit-edge {argv[0]}: error: {said}"


def test_a_list_of_one_recipe_is_no_list(command: Command) -> None:
    assert "for int8_ptq alone: gcvit-edge recipes show int8_ptq" in command.refuses("recipes", "list", "int8_ptq")


# signals


def test_the_second_signal_does_not_end_the_cleaning_up(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned = []

    def interrupted(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)

    monkeypatch.setattr("gcvit_edge.cli.recipes.run", interrupted)
    assert command("recipes", "list").code == 130
    assert cleaned == [True]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_a_library_swallows_ends_the_next_step(
    ending: signal.Signals, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> Result:
        with suppress(KeyboardInterrupt):  # as an `except:` would
            signal.raise_signal(ending)
        with Steps().step("next"):
            return Result("done", ["done"])

    with monkeypatch.context() as patch:
        patch.setattr("gcvit_edge.cli.recipes.run", run)
        outcome = command("recipes", "list")
    assert (outcome.code, outcome.out) == (130, "")
    assert "interrupted; nothing was written" in outcome.err
    assert not interrupted.is_set()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert command("recipes", "list").code == 0


def test_a_signal_while_a_class_is_made(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As modules do that are imported; Python says that `__set_name__` failed then."""

    class Interrupted:
        def __set_name__(self, *_: object) -> None:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("gcvit_edge.cli.recipes.run", lambda *_: type("Made", (), {"attribute": Interrupted()}))
    outcome = command("recipes", "list")
    assert (outcome.code, outcome.out) == (130, "")
    assert "interrupted; nothing was written" in outcome.err


def test_a_hangup_that_is_ignored_stays_so(command: Command) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    assert command("recipes", "list").code == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# output that cannot be written

PRINTING = [["recipes", "show", "int8_ptq"], ["recipes", "list", "--json"], ["benchmark", "--schema"]]


@pytest.mark.parametrize("argv", PRINTING)
def test_a_reader_that_has_gone_is_exit_141(argv: list[str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = gcvit(*argv, cwd=tmp_path, stdout=writer)
    assert (ended.returncode, ended.stderr) == (141, "")
    assert gcvit("recipes", "show", "none", cwd=tmp_path, stderr=writer).returncode == 141
    os.close(writer)


@pytest.mark.parametrize("argv", PRINTING)
def test_a_full_disk_is_exit_4(argv: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ended = gcvit(*argv, cwd=tmp_path, stdout=full)
        assert ended.stderr.startswith("error: No space left on device; make room for the output, or for temporary files in ")
        assert (ended.returncode, ended.stderr.count("\n")) == (4, 1)
        assert gcvit("recipes", "show", "none", cwd=tmp_path, stderr=full).returncode == 4


def test_a_full_disk_is_no_internal_error(command: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gcvit_edge.cli.recipes.run", full)
    with pytest.raises(OSError, match="No space left"):  # of which the entry point makes an exit code
        command("recipes", "list")
    assert capfd.readouterr().err == ""


def test_what_json_does_not_have_is_never_printed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcvit_edge.cli.recipes.run", lambda *_: Result({"db": float("inf")}, []))
    outcome = command("recipes", "list", "--json")
    assert (outcome.code, outcome.out) == (1, "")


# recipes


def test_recipes(command: Command) -> None:
    listed = command("recipes", "list", "--json")
    assert listed.code == 0
    assert "int8_ptq" in [recipe["name"] for recipe in listed.json]
    shown = command("recipes", "show", "int8_ptq", "--json")
    assert shown.json["calibration"] == {"images": 128, "seed": 0, "ranges": "mse", "unit_softmax": False}
    assert "int8_ptq" in command("recipes", "list").out


def test_shown_recipe_is_a_usable_file(command: Command, tmp_path: Path) -> None:
    shown = command("recipes", "show", "int8_ptq").out
    assert shown == recipe_text("int8_ptq")
    (tmp_path / "mine.yaml").write_text(shown)
    assert command("recipes", "show", "mine.yaml", "--json").json == command("recipes", "show", "int8_ptq", "--json").json


def test_recipes_refuse(command: Command) -> None:
    assert "did you mean 'int8_ptq'?" in command.refuses("recipes", "show", "int8_ptqq")
    assert "which recipe?" in command.refuses("recipes", "show")


def test_an_interruption_in_an_exec_is_exit_130(tmp_path: Path) -> None:
    """Python notes an interruption that leaves an `exec` of a string, as dataclasses are made, and would kill itself by SIGINT."""
    (tmp_path / "interrupted_in_exec.py").write_text(
        "from gcvit_edge.cli import entry_point, recipes\nrecipes.run = lambda *_: exec('raise KeyboardInterrupt')\nentry_point()\n"
    )
    ended = subprocess.run([sys.executable, "-m", "interrupted_in_exec", "recipes", "list"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 130
    assert "interrupted; nothing was written" in ended.stderr


# doctor


def test_doctor_quick(command: Command) -> None:
    outcome = command("doctor", "--quick", "--json")
    assert outcome.code == 0
    assert outcome.json["packages"]["onnxruntime"].count(".") == 2
    assert set(outcome.json["backends"]) == {"executorch", "onnx", "openvino"}
    assert set(outcome.json["backends"].values()) == {"not tried"}
    assert outcome.json["cpus"] >= 1
    assert outcome.json["targets"]["local"] == "available"


def test_doctor_shows_messages_that_look_like_markup(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcvit_edge.doctor._try", lambda name: "fails: OSError: [/usr/lib/broken.so]")
    outcome = command("doctor")
    assert outcome.code == 4
    assert outcome.out.count("fails: OSError: [/usr/lib/broken.so]") == 3


def test_doctor_of_a_backend_that_fails_is_exit_4(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcvit_edge.doctor.backend_names", lambda: ["onnx", "tensorrt"])
    outcome = command("doctor", "--json")
    assert outcome.code == 4
    assert outcome.json["backends"]["onnx"].startswith("works")
    assert outcome.err.splitlines()[-1].startswith("error: tensorrt fails: UserError: unknown backend 'tensorrt'")
