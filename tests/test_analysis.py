"""Where quantization hurts: every part of the report against what it should say of networks that are known."""

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CLASSES, EVALUATION_IMAGES, RUINED_LAYER, Tiny, make_tiny

from gcvit_edge import analysis as module
from gcvit_edge.analysis import drift, pareto, plan_analysis
from gcvit_edge.artifact import Artifact
from gcvit_edge.bundle import Bundle
from gcvit_edge.cli import main
from gcvit_edge.data import Labels, decode_images, inputs
from gcvit_edge.lower import roundings, simulate, written
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.checkpoint import save_checkpoint
from gcvit_edge.model.create import describe_model
from gcvit_edge.plan import Job
from gcvit_edge.progress import Steps
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.quantization.sensitivity import logits
from gcvit_edge.recipe import Recipe, parse_recipe
from gcvit_edge.report.analysis import analysis_tables
from gcvit_edge.report.plots import sensitivity_plot
from gcvit_edge.search import Layer, rank

PLAIN = "name: plain\ndescription: x\ncalibration: {images: 24}\nsearch: {ranked_by: 6}\nlimits: {max_drop: 100, min_agreement: 0}\n"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr("gcvit_edge.analysis.TIMED_ROUNDS", 2)
        patch.setattr("gcvit_edge.pipeline.TIMED_ROUNDS", 2)
        yield folder


def options(tiny: Tiny, recipe: Path) -> list[str]:
    recipe.write_text(PLAIN)
    given = ["--recipe", recipe, "--weights", tiny.weights, "--calib", tiny.calib, "--eval", tiny.evaluation, "--threads", 1]
    return [str(each) for each in given]


@pytest.fixture(scope="module", params=["onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("openvino", "executorch"))])
def analysis(
    request: pytest.FixtureRequest, ruined: Tiny, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str]:
    """The analysis of a network with one ruined layer in one runtime: its folder, what it says, and the runtime."""
    folder = tmp_path_factory.mktemp("analysis")
    given = options(ruined, folder / "plain.yaml")
    assert main(["analyze", *given, "--backend", request.param, "-o", str(folder / "out")]) == 0
    return folder / "out", json.loads((folder / "out" / "analysis.json").read_text()), request.param


def test_the_ruined_layer_is_seen(analysis: tuple[Path, dict[str, Any], str]) -> None:
    (entry,) = analysis[1]["backends"]
    layers = {layer["layer"]: layer for layer in entry["layers"]}
    assert len(layers) == 67
    worst = sorted(layers.values(), key=lambda layer: layer["alone_db"])
    assert RUINED_LAYER in [layer["layer"] for layer in worst[:2]]
    assert layers[RUINED_LAYER]["alone_db"] < 6
    assert worst[2]["alone_db"] > 30
    if entry["backend"] != "executorch":  # whose kernel rounds the outputs of the layer before, too
        others = [layer["without_db"] for layer in entry["layers"] if layer["layer"] != RUINED_LAYER]
        assert layers[RUINED_LAYER]["without_db"] > 25 > 6 > max(others)
    assert entry["pareto"]["order"].index(RUINED_LAYER) < 12


def test_runtimes_compute_what_is_simulated_until_noise_is_amplified(analysis: tuple[Path, dict[str, Any], str]) -> None:
    (entry,) = analysis[1]["backends"]
    layers = entry["layers"]
    before = [layer for layer in layers if layer["layer"].startswith(("stages.0.", "stages.1."))]
    assert all(layer["deployed_to_simulated_db"] > 25 for layer in before)
    assert all(layer["deployed_db"] == pytest.approx(layer["simulated_db"], abs=3) for layer in before)
    ruined = next(layer for layer in layers if layer["layer"] == RUINED_LAYER)
    assert ruined["deployed_db"] < 10 < min(layer["deployed_db"] for layer in before)
    assert entry["logits"]["with_taps_to_without_db"] > 20


@pytest.mark.parametrize(
    ("level", "said"), [(52.34, "its logits are within 52.3 dB of the artifact's"), (999.0, "its logits are the artifact's")]
)
def test_what_taps_change_is_said(analysis: tuple[Path, dict[str, Any], str], level: float, said: str) -> None:
    report = copy.deepcopy(analysis[1])
    report["backends"][0]["logits"]["with_taps_to_without_db"] = level
    lines = [each for each in analysis_tables(report) if isinstance(each, str)]
    assert any(line.endswith(f"{said}.") for line in lines)


def test_activations(analysis: tuple[Path, dict[str, Any], str]) -> None:
    places = {place["place"]: place for place in analysis[1]["activations"]}
    outlier = places[f"{RUINED_LAYER}.input"]
    assert outlier["high"] == pytest.approx(3000, rel=0.01)
    assert outlier["imbalance"] > 500
    assert outlier["large_channels"] == pytest.approx(1 / (3 * 64), abs=1e-4)
    assert max(places.values(), key=lambda place: place["imbalance"])["place"] in (f"{RUINED_LAYER}.input", outlier_source())


def outlier_source() -> str:
    return RUINED_LAYER.replace("fc2", "fc1") + ".output"


def test_drift(analysis: tuple[Path, dict[str, Any], str]) -> None:
    for entry in analysis[1]["backends"]:
        total, classes = entry["drift"]["all"], entry["drift"]["classes"]
        assert total["images"] == EVALUATION_IMAGES
        assert {each["class"] for each in classes} == set(CLASSES)
        assert sum(each["lost"] for each in classes) == total["lost"] > 5
        assert [each["drop_points"] for each in classes] == sorted((each["drop_points"] for each in classes), reverse=True)


def test_plots_are_pictures(analysis: tuple[Path, dict[str, Any], str]) -> None:
    folder = analysis[0]
    stems = {"ranges", *(f"{kind}.{analysis[2]}" for kind in ("sensitivity", "pareto"))}
    assert {path.name for path in folder.iterdir()} == {"analysis.json", *(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))}
    for stem in stems:
        with Image.open(folder / f"{stem}.png") as picture:
            assert picture.width > 1000
            assert np.asarray(picture.convert("L")).std() > 10
        assert "</svg>" in (folder / f"{stem}.svg").read_text()


def test_all_rounded_is_of_the_images_of_the_layers(
    analysis: tuple[Path, dict[str, Any], str], ruined: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = planned(ruined, tmp_path)
    assert len(job.ranking.files) > module.COMPARED_IMAGES
    images = list(inputs(decode_images(job.ranking, job.info.preprocessing, tmp_path / "ranking.npy"), job.info.preprocessing))
    pixels = decode_images(job.calibration, job.info.preprocessing, tmp_path / "calib.npy")
    name = analysis[2]
    calibrated = calibrate(job.model, job.recipe, lambda: inputs(pixels, job.info.preprocessing), roundings(job.recipe, [name]))
    rounded, exact = (logits(make(name, calibrated, job.recipe), images) for make in (simulate, written))
    (entry,) = analysis[1]["backends"]
    assert entry["all_rounded_db"] == round(sqnr_db(rounded, exact), 2) != entry["logits"]["simulated_db"]
    drawn = sensitivity_plot(analysis[1], entry).axes[1].texts[0].get_text()
    assert drawn == f" all rounded: {entry['all_rounded_db']:.1f} dB"


def test_again_it_measures_nothing_and_says_the_same(
    analysis: tuple[Path, dict[str, Any], str],
    ruined: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("_layer_by_layer", "_drift"):
        monkeypatch.setattr(f"gcvit_edge.analysis.{name}", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("gcvit_edge.quantization.sensitivity._sqnr", lambda *_: pytest.fail("measured again"))
    assert main(["analyze", *options(ruined, tmp_path / "plain.yaml"), "--backend", analysis[2], "--json"]) == 0
    again = json.loads(capfd.readouterr().out)
    for key in ("all_rounded_db", "layers", "logits", "drift"):
        assert again["backends"][0][key] == analysis[1]["backends"][0][key]
    assert again["activations"] == analysis[1]["activations"]


@pytest.mark.slow
def test_of_a_bundle(
    ruined: Tiny, auto: Bundle, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(ruined, tmp_path / "plain.yaml")
    kept = auto.report["artifacts"][0]["search"]["kept_float"]
    made, lower = [], module.lower_quantized

    def lowered(name: str, calibrated: Any, info: Any, recipe: Recipe, folder: Path) -> Artifact:
        made.append(recipe.keep_float)
        return lower(name, calibrated, info, recipe, folder)

    monkeypatch.setattr("gcvit_edge.analysis.lower_quantized", lowered)
    assert main(["analyze", str(auto.root), *given, "--json"]) == 2
    assert "a bundle is analyzed by the recipe that made it (auto); leave out --recipe" in capfd.readouterr().err
    assert main(["analyze", str(auto.root), *given[2:], "--json"]) == 0
    entry = json.loads(capfd.readouterr().out)["backends"][0]
    assert entry["kept_float"] == kept
    assert {layer["layer"] for layer in entry["layers"] if layer["kept_float"]} == set(kept)
    assert next(layer for layer in entry["layers"] if layer["layer"] == RUINED_LAYER)["deployed_db"] > 20
    assert entry["drift"]["all"]["drop_points"] < 6
    assert made == [()]  # plain INT8, with which latency begins; the bundle has the other
    assert entry["pareto"]["frontier"][0][1] == pytest.approx(entry["plain_ms"], abs=1e-3)
    assert entry["pareto"]["frontier"][-1][1] == pytest.approx(entry["float_ms"], abs=1e-3)
    # of other weights of the same shape
    other = copy.deepcopy(ruined.model)
    with torch.no_grad():
        other.head.fc.weight.neg_()
    save_checkpoint(other, describe_model(other, Labels.of(CLASSES)), tmp_path / "other.safetensors", half=False)
    given[given.index("--weights") + 1] = str(tmp_path / "other.safetensors")
    assert main(["analyze", str(auto.root), *given[2:], "--json"]) == 4
    assert "onnx.int8 of the bundle is not of these weights: " in capfd.readouterr().err


QAT = """\
name: tuned
description: x
backends: [openvino, onnx]
calibration: {images: 24}
limits: {max_drop: 100, min_agreement: 0}
qat: {epochs: 2, batch_size: 8, micro_batch: 4, learning_rate: 1.0e-3, augmentation: {crop_scale: [0.7, 1.0]}}
"""


@pytest.mark.slow  # trains twice
def test_of_a_bundle_that_was_fine_tuned(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, bundle = make_tiny(tmp_path), str(tmp_path / "tuned")
    (tmp_path / "tuned.yaml").write_text(QAT)
    images = ["--weights", str(tiny.weights), "--calib", str(tiny.calib), "--eval", str(tiny.evaluation), "--threads", "1"]
    tuned = [*images, "--train", str(tiny.calib)]
    assert main(["quantize", "--recipe", str(tmp_path / "tuned.yaml"), *tuned, "-o", bundle]) == 0
    tuned += ["--backend", "onnx"]  # which rounds less than both together, for which it was trained
    trained = json.loads((tmp_path / "tuned" / "report.json").read_text())["training"]
    assert main(["analyze", bundle, *images]) == 2
    assert "a model of your own needs --train DIR" in capfd.readouterr().err
    # interrupted after the training: it goes on from what was learned
    with monkeypatch.context() as patch:
        patch.setattr("gcvit_edge.analysis._backend", raise_interrupt)
        assert main(["analyze", bundle, *tuned]) == 130
    (state,) = cache.rglob("*.run")
    monkeypatch.setattr("gcvit_edge.training.loop._train_epoch", lambda *_: pytest.fail("trained again"))
    capfd.readouterr()
    assert main(["analyze", bundle, *tuned, "--json"]) == 0
    assert not state.exists()
    report = json.loads(capfd.readouterr().out)
    assert [epoch["loss"] for epoch in report["training"]["epochs"]] == [epoch["loss"] for epoch in trained["epochs"]]
    (entry,) = report["backends"]
    # the bundle's artifact computes what was learned once more
    assert entry["logits"]["deployed_to_simulated_db"] > 30
    assert entry["logits"]["with_taps_to_without_db"] > 30


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def planned(tiny: Tiny, folder: Path, recipe: str = PLAIN) -> Job:
    (folder / "planned.yaml").write_text(recipe)
    return plan_analysis(
        None, str(folder / "planned.yaml"), folder, model=None, weights=str(tiny.weights), num_classes=None, labels=None,
        preprocessing=None, calib=tiny.calib, eval=tiny.evaluation, train=None, backends=None, threads=1, device=None,
    )  # fmt: skip


def test_a_recipe_that_searches_needs_no_more_images_here(ruined: Tiny, tmp_path: Path) -> None:
    assert planned(ruined, tmp_path, PLAIN.replace("max_drop: 100", "max_drop: 0")).held_out is None


def test_what_is_fitted_to_rounding_is_not_taken_for_float(ruined: Tiny, cache: Path, tmp_path: Path) -> None:
    recipe = parse_recipe("name: x\ndescription: x\nprecision: int4\nrounding: adaptive\nbackends: [onnx]\n", "x.yaml")
    image = np.random.default_rng(0).standard_normal((1, 3, 64, 64), np.float32)
    nearest = recipe.model_copy(update={"rounding": "nearest"})
    plain, fitted = (calibrate(ruined.model, each, lambda: iter([image] * 4)) for each in (nearest, recipe))
    assert sqnr_db(logits(written("onnx", fitted, recipe), [image]), logits(written("onnx", plain, recipe), [image])) > 100
    alone = {layer.name: layer.alone_db for layer in rank("onnx", fitted, recipe, [image], Steps())}
    layers = [name.removesuffix(".weight") for name in fitted.fitted if "global_query" not in name]  # which nothing reads in some stages
    assert len(layers) > 20
    assert all(alone[layer] < 200 for layer in layers)  # it is 999 for what is rounded already


def test_what_cannot_be_is_refused(
    ruined: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*argv: str) -> str:
        assert main(["analyze", *argv]) == 2
        return capfd.readouterr().err

    given = options(ruined, tmp_path / "plain.yaml")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"x")
    assert "photos exists and holds no analysis; give another --output" in refuses(*given, "-o", str(tmp_path / "photos"))
    assert "unknown backend 'onxx'; did you mean 'onnx'?" in refuses(*given, "--backend", "onxx")
    assert "nowhere is no bundle" in refuses("nowhere", *given)
    assert "needs --eval DIR" in refuses(*given[: given.index("--eval")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refuses(*given, "-o", str(tmp_path / "out"))
    assert "plots need matplotlib, which is not installed: pip install matplotlib" in message
    assert not (tmp_path / "out").exists()


def test_pareto_runs_from_int8_to_float() -> None:
    layers = [Layer("loud", 20, 10), Layer("quiet", 50, 90)]
    found = pareto(layers[::-1], float_ms=20, plain_ms=10)
    assert found["order"] == ["loud", "quiet"]
    assert found["frontier"] == [[0, 10, 20.0], [1, 11, 50.0], [2, 20, None]]
    assert found["from_the_image"] == [[0, 10, 20.0], [1, 19, 20.0], [2, 20, None]]
    assert found["candidates"] == [0, 1, 2]


def test_drift_counts_what_each_class_loses() -> None:
    eye = np.eye(3, dtype=np.float32)
    classes = np.array([0, 0, 1, 1, 2, 2])
    reference = eye[[0, 0, 1, 0, 2, 2]]
    found = drift(eye[[0, 1, 1, 1, 2, 2]], reference, classes, Labels.of(["a", "b", "c"]))
    assert [each["class"] for each in found["classes"]] == ["a", "c", "b"]
    assert [(each["lost"], each["won"]) for each in found["classes"]] == [(1, 0), (0, 0), (0, 1)]
    assert (found["all"]["drop_points"], found["all"]["agreement"]) == (0, 0.6667)
    assert found["classes"][1]["sqnr_db"] == 999
