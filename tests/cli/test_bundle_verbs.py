"""verify, predict, evaluate, benchmark: what is done with a bundle."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import Command
from PIL import Image
from tiny import EVALUATION_IMAGES, Tiny

from gcvit_edge.bundle import open_bundle
from gcvit_edge.cli import main
from gcvit_edge.data import find_images
from gcvit_edge.targets import local


def test_verify(command: Command, bundle: Path) -> None:
    outcome = command("verify", bundle, "--json")
    assert outcome.code == 0
    assert outcome.json["files"] == 11
    replays = {replay["artifact"]: replay for replay in outcome.json["replays"]}
    assert set(replays) == {"onnx.float", "onnx.int8"}
    assert replays["onnx.float"]["minimum_db"] == 80
    assert all(replay["sqnr_db"] > 80 for replay in replays.values())
    said = command("verify", bundle).out
    assert "11 files have the hashes that bundle.json lists" in said
    assert "golden/image.png is preprocessed to golden/image.npy here too" in said


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
    outcome = command("verify", ".")
    assert (outcome.code, "is damaged" in outcome.err) == (4, True)


def test_predict(command: Command, bundle: Path, tiny: Tiny) -> None:
    outcome = command("predict", bundle, tiny.image("red"), tiny.image("green"), "--top", 2, "--json")
    assert outcome.code == 0
    assert [entry["image"] for entry in outcome.json] == [str(tiny.image("red")), str(tiny.image("green"))]
    assert [entry["classes"][0]["label"] for entry in outcome.json] == ["red", "green"]
    assert [len(entry["classes"]) for entry in outcome.json] == [2, 2]
    assert outcome.json[0]["classes"][0]["probability"] > 0.9
    ships = open_bundle(bundle).artifact("onnx", "int8")  # float stands in the bundle too, before it
    assert open_bundle(bundle).artifact() == open_bundle(bundle).artifact("onnx") == ships
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


def test_evaluate_some_images(command: Command, bundle: Path, tiny: Tiny) -> None:
    chosen = find_images(tiny.evaluation, "evaluation").select(6, seed=0)
    assert len(set(chosen.classes)) == 4
    answers = open_bundle(bundle).predict([tiny.evaluation / file for file in chosen.files], top=1)
    right = [answer[0][0] == label for answer, label in zip(answers, chosen.classes, strict=True)]
    outcome = command("evaluate", bundle, "--data", tiny.evaluation, "--eval-images", 6, "--json")
    (accuracy,) = (result["accuracy"] for result in outcome.json["runs"][0]["results"] if result["precision"] == "int8")
    assert accuracy["images"] == 6
    assert accuracy["top1"] == pytest.approx(sum(right) / 6)
    assert "eval_images must be at least 1, got 0" in command.refuses("evaluate", bundle, "--data", tiny.evaluation, "--eval-images", 0)


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


def test_evaluate_of_a_baseline_that_guesses_is_exit_4(command: Command, bundle: Path, tiny: Tiny, tmp_path: Path) -> None:
    for image, name in zip(("blue", "green", "red", "yellow"), ("green", "red", "yellow", "blue"), strict=True):
        shutil.copytree(tiny.evaluation / image, tmp_path / "val" / name)
    outcome = command("evaluate", bundle, "--data", "val")
    assert outcome.code == 4
    assert "the float model's top-1 is 0.0% on 40 images, no better than guessing (25.0%)" in outcome.err


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


def test_a_devices_yaml_that_is_not_asked_for_is_not_read(command: Command, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "devices.yaml").write_text("something else of the user's\n")
    for options in ([], ["--target", "local"]):
        outcome = command("benchmark", bundle, *options, "--threads", 1, "--backend", "onnx", "--json")
        assert outcome.code == 0, outcome.err
    assert "devices.yaml is no devices file" in command.refuses("benchmark", bundle, "--target", "board")


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


def test_an_interruption_gives_what_was_done_before(
    command: Command, bundle: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, connected = local.connect, iter([True, False])

    def interrupted(address: str, options: object) -> object:
        if next(connected):
            return connect(address, options)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "connect", interrupted)
    (tmp_path / "devices.yaml").write_text("first: {target: local, threads: 1}\nsecond: {target: local, threads: 1}\n")
    outcome = command("evaluate", bundle, "--data", tiny.evaluation, "--target", "first", "--target", "second", "--json")
    assert outcome.code == 130
    assert outcome.err.endswith("interrupted; the results are those of first, done before\n")
    (run,) = outcome.json["runs"]
    assert (run["device"], [result["precision"] for result in run["results"]]) == ("first", ["float", "int8"])


@pytest.mark.parametrize("verb", ["benchmark", "evaluate", "profile"])
def test_a_damaged_artifact_is_not_measured(verb: str, command: Command, bundle: Path, tiny: Tiny, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    (copy / "model.int8.onnx").write_bytes((copy / "model.int8.onnx").read_bytes()[:-1])
    outcome = command(verb, copy, *{"benchmark": [], "evaluate": ["--data", tiny.evaluation], "profile": ["--backend", "onnx"]}[verb])
    assert outcome.code == 4
    assert "error: model.int8.onnx was changed after the bundle was made" in outcome.err


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
