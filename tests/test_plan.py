"""Requests to quantize, as they are understood before anything long starts."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import AUTO_RECIPE, CLASSES, RECIPE, Tiny, make_tiny, write_images

from gcvit_edge.cache import digest
from gcvit_edge.data import find_images
from gcvit_edge.errors import UserError
from gcvit_edge.measurement.accuracy import images_to_judge
from gcvit_edge.plan import Job, bundle_path, plan
from gcvit_edge.recipe import MIN_CALIBRATION_IMAGES, Search
from gcvit_edge.training.state import state_beside

PER_CLASS = 30
FINE_TUNED = RECIPE + "qat: {epochs: 1, batch_size: 8}\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """With more calibration images than its recipe wants."""
    return make_tiny(tmp_path_factory.mktemp("planned"), PER_CLASS)


@pytest.fixture
def planned(tiny: Tiny, tmp_path: Path) -> Callable[..., Job]:
    """Plans a request for one backend, of a recipe as YAML."""

    def planned(recipe: str = RECIPE, **changes: Any) -> Job:
        (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
        request = {"weights": tiny.weights, "calib": tiny.calib, "eval": tiny.evaluation, "backends": ["onnx"], "output": tmp_path / "out"}
        return plan(str(tmp_path / "mine.yaml"), **(request | changes))

    return planned


# images


def test_as_many_evaluation_images_as_it_takes_are_enough(planned: Callable[..., Job]) -> None:
    needed = images_to_judge(len(CLASSES))
    assert len(planned(eval_images=needed).classes) == needed
    with pytest.raises(UserError, match=f"has {needed - 1} evaluation images; to tell a model of 4 classes from guessing takes {needed}"):
        planned(eval_images=needed - 1)


def test_as_many_calibration_images_as_it_takes_are_enough(planned: Callable[..., Job], tmp_path: Path) -> None:
    write_images(tmp_path / "few", MIN_CALIBRATION_IMAGES, seed=1)
    for path in sorted((tmp_path / "few").iterdir())[1:]:
        shutil.rmtree(path)
    assert len(planned(calib=tmp_path / "few").calibration.files) == MIN_CALIBRATION_IMAGES
    next(find_images(tmp_path / "few", "calibration").root.rglob("*.png")).unlink()
    with pytest.raises(UserError, match=f"has {MIN_CALIBRATION_IMAGES - 1} calibration images; give at least {MIN_CALIBRATION_IMAGES}"):
        planned(calib=tmp_path / "few")


@pytest.mark.parametrize("seed", [0, 3])
def test_the_seed_of_the_recipe_chooses(seed: int, planned: Callable[..., Job], tiny: Tiny) -> None:
    job = planned(RECIPE.replace("{images: 24}", f"{{images: 24, seed: {seed}}}"), eval_images=20)
    assert job.calibration.files == find_images(tiny.calib, "calibration").select(24, seed).files
    assert job.evaluation.files == find_images(tiny.evaluation, "evaluation").some(20, seed).files


@pytest.mark.parametrize(("others", "calibrate"), [(0, True), (Search().ranked_by - 1, True), (Search().ranked_by, False)])
def test_layers_are_ranked_by_images_that_do_not_calibrate_if_there_are_enough(
    others: int, calibrate: bool, planned: Callable[..., Job]
) -> None:
    job = planned(RECIPE.replace("{images: 24}", f"{{images: {PER_CLASS * len(CLASSES) - others}}}"))
    assert len(job.ranking.files) == Search().ranked_by
    assert {file in job.calibration.files for file in job.ranking.files} == {calibrate}


def test_a_search_says_how_many_images_rank_layers(planned: Callable[..., Job]) -> None:
    assert len(planned(AUTO_RECIPE).ranking.files) == 4
    assert len(planned().ranking.files) == Search().ranked_by  # without one, as many as by default


@pytest.mark.parametrize("seed", [0, 3])
def test_the_seed_of_the_recipe_chooses_among_the_images_that_are_left(seed: int, planned: Callable[..., Job], tiny: Tiny) -> None:
    job = planned(AUTO_RECIPE.replace("calibration: {images: 24}", f"calibration: {{images: 24, seed: {seed}}}"))
    rest = find_images(tiny.calib, "calibration").without(job.calibration)
    assert job.held_out is not None
    assert job.held_out.files == rest.select(76, seed).files
    assert job.ranking.files == rest.select(4, seed).files


def test_images_are_held_out_for_a_search_alone(planned: Callable[..., Job]) -> None:
    held_out = planned(AUTO_RECIPE).held_out
    assert held_out is not None
    assert len(held_out.files) == 76
    assert planned(AUTO_RECIPE, searching=False).held_out is None
    assert planned().held_out is None


def test_held_out_images_are_of_the_classes_of_the_network(planned: Callable[..., Job], tiny: Tiny, tmp_path: Path) -> None:
    """Those that calibrate may be of any."""
    calib = shutil.copytree(tiny.calib, tmp_path / "calib")
    shutil.copytree(calib / "red", calib / "purple")
    assert planned(calib=calib).held_out is None
    with pytest.raises(UserError, match="purple"):
        planned(AUTO_RECIPE, calib=calib)


def test_calibration_images_one_folder_down_are_refused(planned: Callable[..., Job], tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.calib, tmp_path / "all" / "train")
    with pytest.raises(UserError, match=r"all has the class folders in a folder, train, which is no class; give .*train"):
        planned(calib=tmp_path / "all")


def test_a_search_on_the_sample_has_the_images_that_are_given(tiny: Tiny) -> None:
    """By default it has more of the sample's than calibration has."""
    with pytest.raises(UserError, match=re.escape(str(tiny.calib))):
        plan("int8_auto", calib=tiny.calib, backends=["onnx"], max_drop=1.0)


# the rest of a request


def test_a_backend_that_is_named_twice_is_made_once(planned: Callable[..., Job]) -> None:
    assert planned(backends=["onnx", "openvino", "onnx"]).backends == ("onnx", "openvino")


def test_places_without_a_name_get_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    assert bundle_path(".", "x", False) == tmp_path / "here" / "below"
    assert bundle_path(".", "x", True) == tmp_path / "here" / "below.zip"
    assert bundle_path("..", "x", False) == tmp_path / "here"
    assert bundle_path("..", "x", True) == tmp_path / "here.zip"
    with pytest.raises(UserError, match="--output / is the root of the file system; choose a folder in it"):
        bundle_path("/", "x", True)


def test_a_zip_ends_so_once() -> None:
    assert bundle_path("a.zip", "x", True) == Path("a.zip")
    assert bundle_path("a", "x", True) == Path("a.zip")
    assert bundle_path(None, "x", True) == Path("x.zip")
    assert bundle_path("a", "x", False) == Path("a")


# fine-tuning


def test_what_a_run_follows_from_are_the_images_that_calibrate(planned: Callable[..., Job], tiny: Tiny) -> None:
    job = planned(FINE_TUNED, train=tiny.calib)
    assert job.tuning is not None
    assert job.tuning.calibration["calibration_images"] == digest(sorted(job.calibration.listing()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_the_device_is_that_of_the_training(planned: Callable[..., Job], tiny: Tiny) -> None:
    with pytest.raises(UserError, match="PyTorch sees no CUDA device here"):
        planned(FINE_TUNED, train=tiny.calib, device="cuda")


def test_an_interrupted_run_is_lost_by_force_alone(planned: Callable[..., Job], tiny: Tiny, tmp_path: Path) -> None:
    state_beside(tmp_path / "out").write_bytes(b"x")
    with pytest.raises(UserError, match=r"out\.run is an interrupted run; give --resume to continue it, or --force"):
        planned(FINE_TUNED, train=tiny.calib)
    assert planned(FINE_TUNED, train=tiny.calib, force=True).tuning is not None
