"""The command line: exit codes, messages, JSON on standard output, and nothing written when something is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import CALIBRATION_IMAGES, CLASSES, EVALUATION_IMAGES, Tiny, make_tiny

from gcvit_edge.cli import main
from gcvit_edge.recipe import recipe_text

VERBS = (
    "analyze", "benchmark", "build-runner", "convert", "doctor", "evaluate", "export", "predict", "profile", "quantize", "recipes", "train",
    "verify",
)  # fmt: skip
GOLDEN = Path(__file__).parent / "golden"
HEAVY = ("torch", "torchvision", "torchao", "onnx", "onnxruntime", "openvino", "nncf", "executorch", "scipy", "pandas", "PIL", "numpy")


@dataclass(frozen=True)
class Outcome:
    """What a command gave. code: exit code. out, err: standard output and error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    """Runs the command line in this process, in an empty current folder."""

    def __init__(self, capfd: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capfd, self.folder = capfd, folder

    def __call__(self, *argv: object) -> Outcome:
        self.capfd.readouterr()
        code = main([str(argument) for argument in argv])
        captured = self.capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    def refuses(self, *argv: object) -> str:
        """Runs what must end with exit code 2, without output and without a file written; gives the message."""
        before = tree(self.folder)
        outcome = self(*argv)
        assert outcome.code == 2, outcome.err
        assert outcome.out == ""
        assert outcome.err.startswith("error: ")
        assert "Traceback" not in outcome.err
        assert tree(self.folder) == before
        return outcome.err


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((p.relative_to(folder).as_posix(), p.stat().st_mtime_ns if p.is_file() else 0) for p in folder.rglob("*"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gcvit_edge.pipeline.TIMED_ROUNDS", 2)
    monkeypatch.setattr("gcvit_edge.export.TIMED_ROUNDS", 2)
    yield Command(capfd, tmp_path)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The bundle of `quantize --json`, float artifact included, in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("made")
    return folder / "bundle", gcvit("quantize", *own(tiny), "--keep-float", "-o", "bundle", "--threads", 1, "--json", cwd=folder)


@pytest.fixture(scope="module")
def bundle(made: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return made[0]


def own(tiny: Tiny) -> list[object]:
    """Options that make `quantize` take the tiny network and its images."""
    return [
        "--recipe", tiny.recipe, "--weights", tiny.weights, "--calib", tiny.calib, "--eval", tiny.evaluation, "--backends", "onnx",
    ]  # fmt: skip


def without(options: Sequence[object], name: str) -> list[object]:
    """The options less one with its value."""
    at = list(options).index(name)
    return [*options[:at], *options[at + 2 :]]


def gcvit(*argv: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gcvit_edge", *map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def python(code: str, **environment: str) -> str:
    switches = ("ORT_DISABLE_TELEMETRY", "NNCF_CI", "HF_HUB_DISABLE_TELEMETRY")
    clean = {key: value for key, value in os.environ.items() if key not in switches}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=clean | environment
    ).stdout.strip()


# starting


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


# recipes


def test_recipes(command: Command) -> None:
    listed = command("recipes", "list", "--json")
    assert listed.code == 0
    assert "int8_ptq" in [recipe["name"] for recipe in listed.json]
    shown = command("recipes", "show", "int8_ptq", "--json")
    assert shown.json["calibration"] == {"images": 128, "seed": 0, "ranges": "minmax", "unit_softmax": False}
    assert "int8_ptq" in command("recipes", "list").out


def test_shown_recipe_is_a_usable_file(command: Command, tmp_path: Path) -> None:
    shown = command("recipes", "show", "int8_ptq").out
    assert shown == recipe_text("int8_ptq")
    (tmp_path / "mine.yaml").write_text(shown)
    assert command("recipes", "show", "mine.yaml", "--json").json == command("recipes", "show", "int8_ptq", "--json").json


def test_recipes_refuse(command: Command) -> None:
    assert "did you mean 'int8_ptq'?" in command.refuses("recipes", "show", "int8_ptqq")
    assert "which recipe?" in command.refuses("recipes", "show")


# quantize


def test_dry_run_on_the_embedded_sample(command: Command, tmp_path: Path) -> None:
    outcome = command("quantize", "--dry-run", "--json")
    assert outcome.code == 0
    planned = outcome.json
    assert (planned["model"], planned["recipe"], planned["classes"]) == ("gcvit_xxtiny", "int8_ptq", 10)
    assert (planned["calibration_images"], planned["evaluation_images"]) == (128, 2000)
    assert planned["backends"] == ["executorch", "openvino", "onnx"]
    assert planned["preprocessing"]["size"] == [224, 224]
    assert planned["licence"] == "Apache-2.0"
    assert planned["output"] == "gcvit_xxtiny.int8_ptq"
    assert list(tmp_path.iterdir()) == []


def test_dry_run_on_own_model(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    outcome = command("quantize", *own(tiny), "--dry-run", "--zip", "--threads", 1)
    assert outcome.code == 0
    assert "dry run: nothing was written" in outcome.out
    assert f"calibration_images: {CALIBRATION_IMAGES}" in outcome.out
    assert "output: gcvit_custom.tiny.zip" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_quantize(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    bundle, done = made
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # standard output is the JSON alone
    assert report == json.loads((bundle / "report.json").read_text())
    assert report["images"] == EVALUATION_IMAGES
    assert report["artifacts"][0]["threads"] == 1
    assert "done calibrate" in done.stderr
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    assert {path.name for path in bundle.iterdir()} >= {"model.float.onnx", "model.int8.onnx"}


def test_broken_limits_are_exit_3(command: Command, tiny: Tiny, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gcvit_edge.artifact import Artifact
    from gcvit_edge.pipeline import Made

    def made_before(job: object, name: str, calibrated: object, held_out: object, work: Path, stage: Path, steps: object) -> Made:
        before = Path(shutil.copy(bundle / "model.float.onnx", work))
        after = Path(shutil.copy(bundle / "model.int8.onnx", stage))
        return Made(Artifact("onnx", "float", before, (before,)), Artifact("onnx", "int8", after, (after,)))

    monkeypatch.setattr("gcvit_edge.pipeline._make", made_before)  # measuring and packing are real
    recipe = tmp_path / "strict.yaml"
    recipe.write_text("name: strict\ndescription: impossible\ncalibration: {images: 16}\nlimits: {max_drop: -100, min_agreement: 1}\n")
    outcome = command("quantize", *without(own(tiny), "--recipe"), "--recipe", recipe, "-o", "out", "--json")
    assert outcome.code == 3, outcome.err
    assert "error: onnx: top-1 drop over -100.0 points or agreement below 100.0%, the limits of strict" in outcome.err
    assert outcome.json["artifacts"][0]["within_limits"] is False
    assert json.loads((tmp_path / "out" / "bundle.json").read_text())["within_limits"] is False


def test_quantize_refuses_names(command: Command, tiny: Tiny) -> None:
    assert "unknown model 'gcvit_xxtinny'; did you mean 'gcvit_xxtiny'?" in command.refuses("quantize", "--model", "gcvit_xxtinny")
    assert "only gcvit_xxtiny comes with weights; give --weights" in command.refuses("quantize", "--model", "gcvit_tiny")
    assert "unknown recipe 'int8_pt'; did you mean 'int8_ptq'?" in command.refuses("quantize", "--recipe", "int8_pt")
    assert "unknown backend 'onxx'; did you mean 'onnx'?" in command.refuses("quantize", "--backends", "openvino", "onxx")
    assert "recipe file none.yaml does not exist" in command.refuses("quantize", "--recipe", "none.yaml")
    assert "threads must be at least 1, got 0" in command.refuses("quantize", *own(tiny), "--threads", 0)


def test_quantize_refuses_a_broken_recipe(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ndescription: x\ncalibraton: {images: 5}\n")
    message = command.refuses("quantize", *without(own(tiny), "--recipe"), "--recipe", "mine.yaml")
    assert "unknown key 'calibraton'; did you mean 'calibration'?" in message


def test_quantize_refuses_images(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    rest = without(own(tiny), "--calib")
    assert "a model of your own needs --calib DIR" in command.refuses("quantize", *rest)
    assert "needs --eval DIR" in command.refuses("quantize", *without(own(tiny), "--eval"))
    assert "calibration folder nowhere does not exist" in command.refuses("quantize", *rest, "--calib", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "calibration folder empty holds no image" in command.refuses("quantize", *rest, "--calib", "empty")
    shutil.copytree(tiny.calib, tmp_path / "few")
    for colour in CLASSES:
        for image in list((tmp_path / "few" / colour).iterdir())[3:]:
            image.unlink()
    message = command.refuses("quantize", *rest, "--calib", "few")
    assert "few has 12 calibration images; give at least 16, better the 24 that the recipe wants" in message


def test_quantize_refuses_folders_that_are_no_classes(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.evaluation, tmp_path / "val")
    (tmp_path / "val" / "yellow").rename(tmp_path / "val" / "yelow")
    message = command.refuses("quantize", *without(own(tiny), "--eval"), "--eval", "val")
    assert "val has 1 folders that are no class of the model: yelow (did you mean 'yellow'?)" in message


@pytest.mark.parametrize(("count", "given"), [(3, "3 labels were given for 4 classes"), (5, "5 labels were given for 4 classes")])
def test_quantize_refuses_labels_of_another_number(count: int, given: str, command: Command, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"class {i}\n" for i in range(count)))
    assert given in command.refuses("quantize", *own(tiny), "--labels", "labels.txt")


def test_quantize_refuses_checkpoints(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    rest = without(own(tiny), "--weights")
    other = GOLDEN / "timm_plain.safetensors"
    message = command.refuses("quantize", *rest, "--weights", other, "--model", "gcvit_tiny")
    assert "timm_plain.safetensors is not of the requested variant" in message
    whole = tiny.weights.read_bytes()
    for name, content in (("half.safetensors", whole[: len(whole) // 2]), ("half.pth", b"PK\x03\x04" + bytes(100)), ("no.pth", b"")):
        (tmp_path / name).write_bytes(content)
        message = command.refuses("quantize", *rest, "--weights", name)
        assert f"checkpoint {name} is truncated or no" in message
        assert "download it again" in message
    assert "checkpoint none.pth does not exist" in command.refuses("quantize", *rest, "--weights", "none.pth")
    assert "4 classes, but 7 were asked for" in command.refuses("quantize", *own(tiny), "--num-classes", 7)


def test_quantize_refuses_outputs(command: Command, tiny: Tiny, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "mine")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"x")
    assert "mine exists and holds a bundle; give --force" in command.refuses("quantize", *own(tiny), "-o", "mine")
    assert "notes.txt exists; give another --output" in command.refuses("quantize", *own(tiny), "-o", "notes.txt")
    assert "photos exists and is not a bundle" in command.refuses("quantize", *own(tiny), "-o", "photos", "--force")
    assert "cannot write to notes.txt" in command.refuses("quantize", *own(tiny), "-o", "notes.txt/bundle")


def test_baseline_no_better_than_chance_is_exit_4(command: Command, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gcvit_edge import pipeline

    guesses = np.tile(np.eye(4, dtype=np.float32), (EVALUATION_IMAGES // 4, 1))
    monkeypatch.setattr(pipeline, "_make", lambda *_: pipeline.Made(None, None))  # type: ignore[arg-type]
    monkeypatch.setattr(pipeline, "run_artifacts", lambda *_: [guesses, guesses])
    outcome = command("quantize", *own(tiny), "-o", "out", "--json")
    assert outcome.code == 4
    assert outcome.out == ""
    assert "the float model's top-1 is 25.0% on 40 images, no better than guessing (25.0%)" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_internal_error_is_exit_1_and_leaves_nothing(command: Command, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcvit_edge.pipeline._make", lambda *_: 1 / 0)
    outcome = command("quantize", *own(tiny), "-o", "out")
    assert outcome.code == 1
    assert "ZeroDivisionError" in outcome.err
    assert "internal error" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_exit_130_and_leaves_nothing(command: Command, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gcvit_edge.pipeline._make", interrupted)
    outcome = command("quantize", *own(tiny), "-o", "out", "--json")
    assert outcome.code == 130
    assert outcome.out == ""
    assert "interrupted; nothing was written" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_sigterm_is_exit_130_and_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "gcvit_edge", "quantize", *map(str, own(tiny)), "-o", "out"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    assert process.stderr is not None
    seen = process.stderr.readline()  # the first finished step: the bundle is under way
    time.sleep(0.5)
    assert list(tmp_path.glob(".out.partial-*")), seen
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "interrupted; nothing was written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert list((tmp_path / "temporary").iterdir()) == []


# verify, predict, evaluate, benchmark


def test_verify(command: Command, bundle: Path) -> None:
    outcome = command("verify", bundle, "--json")
    assert outcome.code == 0
    assert outcome.json["files"] == 9
    replays = {replay["artifact"]: replay for replay in outcome.json["replays"]}
    assert set(replays) == {"onnx.float", "onnx.int8"}
    assert replays["onnx.float"]["minimum_db"] == 80
    assert all(replay["sqnr_db"] > 80 for replay in replays.values())
    assert "9 files have the hashes that bundle.json lists" in command("verify", bundle).out


def test_verify_of_a_tampered_bundle_is_exit_4(command: Command, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    data = bytearray((copy / "model.int8.onnx").read_bytes())
    data[1000] ^= 0xFF
    (copy / "model.int8.onnx").write_bytes(data)
    outcome = command("verify", "copy", "--json")
    assert outcome.code == 4
    assert outcome.out == ""
    assert "error: model.int8.onnx was changed after the bundle was made" in outcome.err


def test_verify_refuses_what_is_no_bundle(command: Command, tmp_path: Path) -> None:
    assert "nowhere is no bundle" in command.refuses("verify", "nowhere")
    (tmp_path / "bundle.json").write_text("{")
    assert "is damaged" in command.refuses("verify", ".")


def test_predict(command: Command, bundle: Path, tiny: Tiny) -> None:
    outcome = command("predict", bundle, tiny.image("red"), tiny.image("green"), "--top", 2, "--json")
    assert outcome.code == 0
    assert [entry["image"] for entry in outcome.json] == [str(tiny.image("red")), str(tiny.image("green"))]
    assert [entry["classes"][0]["label"] for entry in outcome.json] == ["red", "green"]
    assert [len(entry["classes"]) for entry in outcome.json] == [2, 2]
    assert outcome.json[0]["classes"][0]["probability"] > 0.9
    text = command("predict", bundle, tiny.image("blue"), "--backend", "onnx").out.splitlines()
    assert text[0] == str(tiny.image("blue"))
    assert text[1].split()[-1] == "blue"


def test_predict_refuses(command: Command, bundle: Path, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    assert "image none.png does not exist" in command.refuses("predict", bundle, tiny.image("red"), "none.png")
    assert "image text.png does not decode" in command.refuses("predict", bundle, "text.png")
    message = command.refuses("predict", bundle, tiny.image("red"), "--backend", "openvino")
    assert "unknown backend of this bundle 'openvino'" in message
    assert "known: onnx" in message


@pytest.mark.parametrize("top", [0, -1])
def test_predict_refuses_fewer_than_one_class(top: int, command: Command, bundle: Path, tiny: Tiny) -> None:
    assert "top" in command.refuses("predict", bundle, tiny.image("red"), "--top", top)


def test_predict_shows_any_label_as_it_is(command: Command, bundle: Path, tiny: Tiny, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    data = json.loads((copy / "bundle.json").read_text())
    data["model"]["labels"]["names"] = ["[bold]", "[/red]", "red [dotted]", "x"]
    (copy / "bundle.json").write_text(json.dumps(data))
    outcome = command("predict", copy, tiny.image("red"))
    assert outcome.code == 0, outcome.err
    assert "red [dotted]" in outcome.out
    assert "[/red]" in outcome.out


def test_evaluate(command: Command, bundle: Path, tiny: Tiny) -> None:
    outcome = command("evaluate", bundle, "--data", tiny.evaluation, "--json")
    assert outcome.code == 0
    (run,) = outcome.json["runs"]
    assert (run["device"], run["target"]) == ("local", "local")
    entries = {result["precision"]: result["accuracy"] for result in run["results"]}
    report = json.loads((bundle / "report.json").read_text())
    assert entries["float"]["images"] == EVALUATION_IMAGES
    assert entries["float"]["top1"] == pytest.approx(report["float"]["top1"])
    assert entries["int8"]["top1"] == pytest.approx(report["artifacts"][0]["top1"])
    assert entries["int8"]["agreement"] == pytest.approx(report["artifacts"][0]["agreement"])
    assert entries["int8"]["sqnr_db"] == pytest.approx(report["artifacts"][0]["sqnr_db"], abs=0.01)
    low, high = entries["int8"]["top1_ci95"]
    assert low < entries["int8"]["top1"] <= high + 1e-9
    assert entries["float"]["drop_points"] is None
    assert all(result["parity"]["passed"] for result in run["results"])
    shown = command("evaluate", bundle, "--data", tiny.evaluation, "--backend", "onnx").out
    assert "40 images" in shown


def test_evaluate_skips_and_names_an_unreadable_image(command: Command, bundle: Path, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.evaluation, tmp_path / "val")
    (tmp_path / "val" / "red" / "0.png").write_bytes(b"broken")
    outcome = command("evaluate", bundle, "--data", "val", "--json")
    assert outcome.json["runs"][0]["results"][0]["accuracy"]["images"] == EVALUATION_IMAGES - 1
    assert outcome.json["skipped_images"] == ["red/0.png"]


def test_evaluate_refuses(command: Command, bundle: Path, tmp_path: Path) -> None:
    assert "evaluation folder none does not exist" in command.refuses("evaluate", bundle, "--data", "none")
    (tmp_path / "val" / "purple").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "purple" / "1.png")
    assert "no class of the model: purple" in command.refuses("evaluate", bundle, "--data", "val")


def test_benchmark_of_two_devices_side_by_side(command: Command, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "devices.yaml").write_text("one: {target: local, threads: 1}\n")
    outcome = command("benchmark", bundle, "--target", "one", "--target", "local", "--json")
    assert outcome.code == 0, outcome.err
    assert [run["device"] for run in outcome.json["runs"]] == ["one", "local"]
    one, local = outcome.json["runs"]
    assert {result["threads"] for result in one["results"]} == {1}
    assert {result["threads"] for result in local["results"]} == {local["machine"]["cpus"]}
    for result in [*one["results"], *local["results"]]:
        latency = result["latency"]
        assert len(latency["samples_ms"]) == 150
        assert 0 < latency["p50_ms"] <= latency["p90_ms"] <= latency["p99_ms"]
        assert sum(result["files"].values()) == (bundle / f"model.{result['precision']}.onnx").stat().st_size
        assert result["peak_rss_mb"] >= result["runtime_rss_mb"] > 10
        assert result["parity"]["sqnr_db"] > 80
    shown = command("benchmark", bundle, "--threads", 1).out
    assert "p90" in shown
    assert "; 1 thread" in shown


def test_a_fast_wrong_answer_is_exit_5(command: Command, bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    golden = copy / "golden" / "onnx.int8.npy"
    np.save(golden, np.roll(np.load(golden), 1, axis=1))
    outcome = command("benchmark", copy, "--threads", 1, "--json")
    assert outcome.code == 5
    assert "error: logits other than the golden ones: local: onnx.int8 (cpu)" in outcome.err
    results = {result["precision"]: result for result in outcome.json["runs"][0]["results"]}  # still measured, and told apart
    assert results["float"]["parity"]["passed"]
    assert not results["int8"]["parity"]["passed"]
    assert results["int8"]["latency"]["p50_ms"] > 0


def test_benchmark_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", "--schema"])
    assert ended.value.code == 0
    assert set(json.loads(capsys.readouterr().out)["required"]) == {"gcvit_edge", "finished", "model", "mode", "runs"}


@pytest.mark.parametrize("verb", [["benchmark"], ["evaluate", "--data", "."]])
def test_devices_are_refused_before_anything_starts(verb: list[str], command: Command, bundle: Path, tmp_path: Path) -> None:
    argv = [*verb, bundle]
    assert "threads must be at least 1, got 0" in command.refuses(*argv, "--threads", 0)
    assert "unknown device or target 'lokal'; did you mean 'local'?" in command.refuses(*argv, "--target", "lokal")
    assert "local takes no address; write local" in command.refuses(*argv, "--target", "local:here")
    assert "unknown backend of this bundle 'onxx'; did you mean 'onnx'?" in command.refuses(*argv, "--backend", "onxx")
    assert "cannot read devices file none.yaml" in command.refuses(*argv, "--devices", "none.yaml")


# convert, export


def test_convert(command: Command, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("".join(f"class {i}\n" for i in range(_classes())))
    argv = ["convert", "--weights", GOLDEN / "timm_plain.safetensors", "--labels", "labels.txt", "-o", "mine.safetensors"]
    outcome = command(*argv, "--licence", "MIT", "--origin", "a test", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["file"] == "mine.safetensors"
    assert outcome.json["origin"]["licence"] == "MIT"
    assert outcome.json["origin"]["source"] == "a test"
    from gcvit_edge import load_model

    _, info = load_model(str(tmp_path / "mine.safetensors"))
    assert (info.origin.licence, info.labels.names[1]) == ("MIT", "class 1")
    assert "mine.safetensors exists; give --force" in command.refuses(*argv)
    whole = (tmp_path / "mine.safetensors").stat().st_size
    assert command(*argv, "--force", "--half").code == 0
    assert (tmp_path / "mine.safetensors").stat().st_size < 0.6 * whole


def _classes() -> int:
    return np.load(GOLDEN / "timm_plain_logits.npy").shape[1]


def test_convert_refuses(command: Command, tmp_path: Path) -> None:
    weights = GOLDEN / "timm_plain.safetensors"
    assert "convert needs --weights" in command.refuses("convert", "-o", "a.safetensors")
    assert "--output must end in .safetensors, got a.pth" in command.refuses("convert", "--weights", weights, "-o", "a.pth")
    assert "checkpoint none.pth does not exist" in command.refuses("convert", "--weights", "none.pth", "-o", "a.safetensors")


def test_convert_refuses_a_folder_that_does_not_exist(command: Command) -> None:
    message = command.refuses("convert", "--weights", GOLDEN / "timm_plain.safetensors", "-o", "none/a.safetensors")
    assert "cannot write none/a.safetensors" in message


def test_export(command: Command, tiny: Tiny, tmp_path: Path) -> None:
    outcome = command("export", "--weights", tiny.weights, "--backends", "onnx", "-o", "float.zip", "--json")
    assert outcome.code == 0, outcome.err
    (entry,) = outcome.json["artifacts"]
    assert (entry["backend"], entry["precision"], entry["file"]) == ("onnx", "float", "model.float.onnx")
    assert entry["parity_db"] > 80
    assert [path.name for path in tmp_path.iterdir()] == ["float.zip"]
    assert command("verify", "float.zip", "--json").json["replays"][0]["sqnr_db"] > 80
    assert command("predict", "float.zip", tiny.image("yellow"), "--json").json[0]["classes"][0]["label"] == "yellow"
    message = command.refuses("export", "--weights", tiny.weights, "--backends", "onnx", "-o", "float.zip")
    assert "float.zip exists and holds a bundle" in message


def test_export_refuses(command: Command, tiny: Tiny) -> None:
    assert "did you mean 'openvino'?" in command.refuses("export", "--weights", tiny.weights, "--backends", "opnvino")
    assert "only gcvit_xxtiny comes with weights" in command.refuses("export", "--model", "gcvit_base")
    assert "checkpoint none.pth does not exist" in command.refuses("export", "--weights", "none.pth")


@pytest.mark.parametrize("threads", [0, -1])
def test_export_refuses_no_threads(threads: int, command: Command, tiny: Tiny) -> None:
    argv = ["export", "--weights", tiny.weights, "--backends", "onnx", "--threads", threads, "-o", "out"]
    assert f"threads must be at least 1, got {threads}" in command.refuses(*argv)


# doctor


def test_doctor_quick(command: Command) -> None:
    outcome = command("doctor", "--quick", "--json")
    assert outcome.code == 0
    assert outcome.json["packages"]["onnxruntime"].count(".") == 2
    assert set(outcome.json["backends"]) == {"executorch", "onnx", "openvino"}
    assert set(outcome.json["backends"].values()) == {"not tried"}
    assert outcome.json["cpus"] >= 1
    assert outcome.json["targets"]["local"] == "available"
