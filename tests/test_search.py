"""int8_auto: what stays float, why, and that an interrupted search goes on where it was."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from searched import hurry, order_times, searched
from tiny import AUTO_RECIPE, CLASSES, RUINED_LAYER, Tiny, make_ruined, make_tiny

from gcvit_edge import search as module
from gcvit_edge.bundle import Bundle, open_bundle
from gcvit_edge.cli import main
from gcvit_edge.data import Labels
from gcvit_edge.errors import UserError
from gcvit_edge.model.checkpoint import save_checkpoint
from gcvit_edge.model.create import describe_model
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.plan import plan
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.recipe import Limits, parse_recipe, recipe_text
from gcvit_edge.report.search import search_lines
from gcvit_edge.search import Layer, candidates, frontier, predicted_ms, within
from gcvit_edge.targets.local import run_artifacts

LAYERS = [Layer("quiet", 60, 100), Layer("loud", 20, 1000), Layer("cheap", 45, 1), Layer("dear", 40, 100_000)]


def test_noise_for_each_multiplication_decides_who_is_first() -> None:
    assert [layer.name for layer in frontier(LAYERS)] == ["cheap", "loud", "quiet", "dear"]


def test_candidates_are_steps_of_noise_that_end_with_all() -> None:
    # without "cheap" the noise hardly falls; with "loud" by 20 dB; "quiet" adds nothing to that; then all
    assert candidates(frontier(LAYERS)) == [0, 2, 4]
    same = [Layer(str(i), 30, 10) for i in range(10)]
    assert candidates(same) == [0, 4, 7, 9, 10]
    assert candidates(LAYERS[:1]) == [0, 1]


def test_what_int8_saves_is_shared_out_by_multiplications() -> None:
    order = [Layer("a", 30, 25), Layer("b", 30, 75)]
    assert [predicted_ms(order, count, 20, 12) for count in range(3)] == [12, 14, 20]


def test_within_asks_for_the_upper_end_of_the_interval() -> None:
    accuracy = {"drop_points": 0.1, "drop_ci95": (-0.3, 0.5), "agreement": 0.99}
    assert within(accuracy, Limits(max_drop=0.5, min_agreement=0.99))
    assert not within(accuracy, Limits(max_drop=0.49, min_agreement=0))
    assert not within(accuracy, Limits(max_drop=0.5, min_agreement=0.995))


def test_onnx_runtime_by_its_other_name(make_model: Callable[..., GCViT], onnxruntime_gpu: str) -> None:
    recipe = parse_recipe(recipe_text("int8_auto"), "int8_auto")
    images = [np.zeros((1, 3, 64, 64), np.float32)]
    calibrated = calibrate(make_model(depths=(1, 1, 1, 1)), recipe, lambda: iter(images))
    known = module.measurements("onnx", calibrated, recipe, images)
    assert known.get("a measurement", lambda: 1.0) == 1.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hurry(monkeypatch, tmp_path / "cache")


@pytest.fixture
def known(auto: Bundle, tmp_path: Path) -> Path:
    """A copy of the cache of the search that `auto` is of."""
    return Path(shutil.copytree(auto.root.parent / "cache", tmp_path / "cache"))


def integer_products(bundle: Bundle) -> int:
    graph = onnx.load(bundle.artifact("onnx", "int8").path).graph
    return sum(node.op_type == "MatMulInteger" for node in graph.node)


def test_the_one_layer_that_ruins_int8_stays_float(auto: Bundle) -> None:
    check_the_one_layer(auto)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["openvino", "executorch"])
def test_so_it_does_in_other_runtimes(ruined: Tiny, tmp_path: Path, backend: str) -> None:
    check_the_one_layer(searched(ruined, tmp_path / "auto", backends=[backend]))


def check_the_one_layer(bundle: Bundle) -> None:
    entry = bundle.report["artifacts"][0]
    found = entry["search"]
    assert found["tried"][0]["layers_float"] == 0
    assert found["tried"][0]["drop_points"] > 20
    assert not found["tried"][0]["within"]
    assert RUINED_LAYER in found["kept_float"]
    assert len(found["kept_float"]) < 12  # of 62: only what costs as good as nothing goes with it
    assert next(trial for trial in found["tried"] if trial["layers_float"] == len(found["kept_float"]))["within"]
    assert entry["drop_points"] <= 6
    assert bundle.manifest.within_limits
    assert len(found["safe_choice"]) > 12  # all from the image to that layer
    assert RUINED_LAYER in found["safe_choice"]
    assert set(found["latency_ms"]) == {"float", "plain", "chosen", "safe", "predicted"}
    assert f"{len(found['kept_float'])} layers stay float" in search_lines(bundle.report)[0]
    assert bundle.verify()[f"{entry['backend']}.int8"].passed


@pytest.mark.slow
def test_the_file_has_these_layers_in_float(ruined: Tiny, auto: Bundle, tmp_path: Path) -> None:
    kept = auto.report["artifacts"][0]["search"]["kept_float"]
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("name: plain\ndescription: x\ncalibration: {images: 24}\nlimits: {max_drop: 100, min_agreement: 0}\n")
    plain = searched(ruined, tmp_path / "plain", recipe=recipe)
    delicate = ("head", "squeeze", "excite")  # have INT8 weights, but no integer product
    products = [name for name in kept if not name.endswith(delicate)]
    assert integer_products(auto) == integer_products(plain) - len(products) > 0
    # the same layers, named in a recipe
    recipe.write_text(recipe.read_text() + f"keep_float: {json.dumps(kept)}\n")
    named = searched(ruined, tmp_path / "named", recipe=recipe)
    assert named.artifact("onnx").path.read_bytes() == auto.artifact("onnx").path.read_bytes()


def test_nothing_stays_float_where_plain_int8_is_within_the_limit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny = make_tiny(tmp_path / "tiny", per_class=25)
    (tmp_path / "auto.yaml").write_text(AUTO_RECIPE)
    code = main([
        "quantize", "--recipe", str(tmp_path / "auto.yaml"), "--weights", str(tiny.weights), "--calib", str(tiny.calib),
        "--eval", str(tiny.evaluation), "--backends", "onnx", "--max-drop", "7", "-o", str(tmp_path / "out"), "--threads", "1",
    ])  # fmt: skip
    captured = capfd.readouterr()
    assert code == 0, captured.err
    report = open_bundle(tmp_path / "out").report
    found = report["artifacts"][0]["search"]
    assert (found["kept_float"], found["latency_ms"], len(found["tried"])) == ([], None, 1)
    assert report["limits"]["max_drop"] == 7
    assert "so no layer stays float" in captured.out.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_the_safe_choice_is_taken_if_it_is_faster(ruined: Tiny, auto: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with layers that are cheap in INT8 only together with their neighbours."""
    order_times(monkeypatch, "safe")
    bundle = searched(ruined, tmp_path / "auto")
    found = bundle.report["artifacts"][0]["search"]
    assert found["found"] == auto.report["artifacts"][0]["search"]["kept_float"]
    assert found["kept_float"] == sorted(found["safe_choice"])
    assert found["tried"][-1]["layers_float"] == len(found["safe_choice"])
    assert integer_products(bundle) < integer_products(auto)
    assert f"the {len(found['found'])} layers that were found first take" in "".join(search_lines(bundle.report))


def test_an_interrupted_search_goes_on_where_it_was(ruined: Tiny, auto: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def interrupted(name: str, calibrated: Any, recipe: Any, keep: Any, images: Any) -> Any:
        raise KeyboardInterrupt

    def counted(artifacts: Any, *rest: Any) -> Any:
        ran.append(artifacts)
        return run_artifacts(artifacts, *rest)

    monkeypatch.setattr(module, "run_artifacts", counted)
    with monkeypatch.context() as patch:
        patch.setattr(module, "safe_choice", interrupted)
        with pytest.raises(KeyboardInterrupt):
            searched(ruined, tmp_path / "first")
    assert not (tmp_path / "first").exists()
    assert len(ran) >= 3  # float, plain and a candidate
    ran.clear()
    resumed = searched(ruined, tmp_path / "second").report["artifacts"][0]["search"]
    assert ran == []
    for key in ("kept_float", "safe_choice", "tried"):
        assert resumed[key] == auto.report["artifacts"][0]["search"][key]


@pytest.mark.slow
def test_other_ranges_are_measured_anew(ruined: Tiny, known: Path, tmp_path: Path) -> None:
    before = set(known.rglob("*.jsonl"))
    assert len(before) == 2  # of layers, and of artifacts
    searched(make_ruined(tmp_path / "same"), tmp_path / "a")
    assert set(known.rglob("*.jsonl")) == before  # the same weights and images in another place are the same
    recipe = tmp_path / "other.yaml"
    recipe.write_text(ruined.recipe.read_text().replace("calibration: {images: 24}", "calibration: {images: 20}"))
    searched(ruined, tmp_path / "b", recipe=recipe)
    assert len(set(known.rglob("*.jsonl")) - before) == 2


def test_max_drop_overrides_the_recipe(ruined: Tiny, tmp_path: Path) -> None:
    folders = {"weights": ruined.weights, "calib": ruined.calib, "eval": ruined.evaluation}
    assert plan(str(ruined.recipe), **folders).recipe.limits.max_drop == 6
    assert plan(str(ruined.recipe), **folders, max_drop=8).recipe.limits == Limits(max_drop=8, min_agreement=0)
    assert plan("int8_ptq", **folders, max_drop=-1).recipe.limits.max_drop == -1
    with pytest.raises(UserError, match=r"--max-drop is not valid:\n  max_drop: got nan"):
        plan("int8_ptq", **folders, max_drop=float("nan"))


def test_too_few_images_are_refused(ruined: Tiny, tmp_path: Path) -> None:
    folders = {"weights": ruined.weights, "calib": ruined.calib, "eval": ruined.evaluation}
    with pytest.raises(UserError, match=r"leaves 76 images .* a drop of at most 1\.0 points with 95 % confidence takes 194"):
        plan(str(ruined.recipe), **folders, max_drop=1)
    with pytest.raises(UserError, match=r"auto searches for a drop of at most 0\.0 points, .* give a --max-drop over 0"):
        plan(str(ruined.recipe), **folders, max_drop=0)
    job = plan(str(ruined.recipe), **folders)
    assert job.held_out is not None
    assert not set(job.held_out.files) & set(job.calibration.files)
    assert job.held_out.root != job.evaluation.root


def test_images_that_do_not_decode_may_leave_too_few(ruined: Tiny, tmp_path: Path) -> None:
    damaged = replace(ruined, calib=tmp_path / "calib")
    shutil.copytree(ruined.calib, damaged.calib)
    job = plan(str(damaged.recipe), weights=damaged.weights, calib=damaged.calib, eval=damaged.evaluation, max_drop=2.52)
    assert job.held_out is not None
    (damaged.calib / job.held_out.files[0]).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"leaves 75 images that do not calibrate \(of 76, .*\), .* takes 76, better three times"):
        searched(damaged, tmp_path / "out", max_drop=2.52)


def test_the_embedded_sample_holds_images_out(tmp_path: Path) -> None:
    job = plan("int8_auto", output=tmp_path / "out")
    assert job.held_out is not None
    assert (job.calibration.root.name, job.evaluation.root.name) == ("train.zip", "eval.zip")
    assert (len(job.calibration.files), len(job.held_out.files)) == (128, 872)


def test_lines_are_of_the_artifact_that_ships() -> None:
    trial = {"layers_float": 1, "drop_ci95": [-0.1, 0.2], "within": True}
    safe = trial | {"drop_ci95": [0.1, 7.0], "within": False}  # as many layers, faster, and refused
    ms = {"plain": 1.0, "chosen": 2.0, "safe": 1.5, "float": 3.0}
    search = {"kept_float": ["head"], "found": ["head"], "safe_choice": ["conv1"], "latency_ms": ms}
    search["tried"] = [trial | {"layers_float": 0, "drop_ci95": [1.0, 3.0], "within": False}, trial, safe]
    search |= {"images": 2000, "float_top1": 0.9}
    report = {"limits": {"max_drop": 0.5}, "artifacts": [{"backend": "onnx", "search": search}], "images": 700, "float": {"top1": 0.89}}
    lines = search_lines(report)
    assert "at most 0.20 points on held-out images (limit 0.5; plain INT8 3.00)" in lines[0]
    assert len(lines) == 2
    search["tried"] = [search["tried"][0], safe]
    search["float_top1"] = 0.99
    lines = search_lines(report)
    assert "at most 7.00 points on held-out images (limit 0.5, which nothing keeps there; plain INT8 3.00)" in lines[0]
    assert lines[2].startswith(
        "Float is right on 99.0% of the held-out images and on 89.0% of the evaluation images: it was probably trained"
    )


def test_a_search_on_images_that_float_does_not_know_ends_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As with labels in another order, which would be found after it otherwise."""
    tiny = make_tiny(tmp_path / "tiny", per_class=25)
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        model.head.fc.weight.zero_()  # the bias decides alone
    save_checkpoint(model, describe_model(model, Labels.of(CLASSES)), tmp_path / "other.safetensors", half=False)
    (tmp_path / "auto.yaml").write_text(AUTO_RECIPE)
    code = main([
        "quantize", "--recipe", str(tmp_path / "auto.yaml"), "--weights", str(tmp_path / "other.safetensors"), "--calib", str(tiny.calib),
        "--eval", str(tiny.evaluation), "--backends", "onnx", "--max-drop", "7", "-o", str(tmp_path / "out"), "--threads", "1",
    ])  # fmt: skip
    captured = capfd.readouterr()
    assert code == 4, captured.err
    assert "no better than guessing (25.0%)" in captured.err
    assert "layers in float" not in captured.err
