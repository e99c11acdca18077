"""One contract that every backend passes; a new backend is tested here unasked."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import Backend, backend_names, load_backend
from gcvit_edge.bundle.manifest import sha256
from gcvit_edge.lower import lower_float, lower_quantized
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.model.info import ModelInfo
from gcvit_edge.quantization.calibrate import Calibrated, calibrate
from gcvit_edge.quantization.sensitivity import logits
from gcvit_edge.recipe import Recipe, parse_recipe, recipe_text
from gcvit_edge.targets.local import Session

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((16, 3, 64, 64), np.float32)]


@dataclass(frozen=True)
class Small:
    """A small model, what calibration made of it, and its logits (16, 8)."""

    model: GCViT
    info: ModelInfo
    recipe: Recipe
    calibrated: Calibrated
    expected: np.ndarray
    others: dict[str, tuple[Recipe, Calibrated]] = field(default_factory=dict)

    def nearest(self, precision: str) -> tuple[Recipe, Calibrated]:
        """In another precision, with weights rounded to the nearest: once for all backends."""
        if precision not in self.others:
            recipe = self.recipe.model_copy(update={"precision": precision, "rounding": "nearest"})
            self.others[precision] = recipe, calibrate(self.model, recipe, lambda: iter(IMAGES))
        return self.others[precision]


@pytest.fixture(scope="module")
def small() -> Small:
    torch.manual_seed(0)
    # two blocks in the first stage: a local and a global one, with several windows
    model = create_model(dim=16, depths=(2, 1, 1, 1), num_heads=(2, 2, 4, 8), num_classes=8, img_size=64)
    recipe = parse_recipe(recipe_text("int8_ptq"), "int8_ptq")
    return Small(model, describe_model(model), recipe, calibrate(model, recipe, lambda: iter(IMAGES)), logits(model, IMAGES))


class Made:
    """What a backend makes of it, once for all tests."""

    def __init__(self, name: str, small: Small, folder: Path) -> None:
        self.backend: Backend = load_backend(name)
        self.model, self.info, self.recipe, self.calibrated = small.model, small.info, small.recipe, small.calibrated
        self.expected = small.expected
        self.float = lower_float(name, self.model, self.info, folder)
        self.int8 = self.quantized(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gcvit_edge.backends._fast_export.fast_export", nullcontext)
            self.plain = lower_float(name, self.model, self.info, folder / "plain")  # quantization must not have changed the model

    def quantized(self, folder: Path, operators: tuple[str, ...] = ("linear", "conv")) -> Artifact:
        recipe = self.recipe.model_copy(update={"operators": operators})
        return lower_quantized(self.float.backend, self.calibrated, self.info, recipe, folder)

    def run(self, artifact: Artifact, threads: int = 1) -> np.ndarray:
        run = self.backend.load(artifact.path, threads)
        return np.concatenate([run(image) for image in IMAGES])


@pytest.fixture(scope="module", params=backend_names())
def made(request: pytest.FixtureRequest, small: Small, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, small, tmp_path_factory.mktemp(request.param))


def test_float_artifact_is_exact(made: Made) -> None:
    answers = made.run(made.float)
    assert answers.dtype == np.float32
    assert answers.shape == made.expected.shape
    assert sqnr_db(answers, made.expected) > 100


def test_int8_artifact_is_close_and_no_float_in_disguise(made: Made) -> None:
    noise = sqnr_db(made.run(made.int8), made.expected)
    assert 25 < noise < 70


def test_quantization_leaves_the_model_alone(made: Made) -> None:
    np.testing.assert_array_equal(made.run(made.float), made.run(made.plain))


def test_same_answers_on_one_and_two_threads(made: Made) -> None:
    assert sqnr_db(made.run(made.int8, threads=2), made.run(made.int8, threads=1)) > 60


def test_same_answers_in_a_fresh_process(made: Made) -> None:
    with Session(made.int8, threads=1) as session:
        assert session.load_ms > 0
        assert session.runtime_rss_mb > 10
        assert sqnr_db(session.infer(np.concatenate(IMAGES), lambda: None), made.run(made.int8)) > 60
        assert all(ms > 0 for ms in session.time(IMAGES[0], 3).ms)
        assert session.peak_rss_mb() >= session.runtime_rss_mb


def test_files_exist_and_int8_is_smaller(made: Made) -> None:
    assert all(file.is_file() for file in made.int8.files)
    assert made.int8.path == made.int8.files[0]
    assert made.int8.size_bytes < made.float.size_bytes


def test_files_repeat(made: Made, tmp_path: Path) -> None:
    """To the bit, whatever the process made before: counters of exporters must not show, nor what makes them faster."""
    for first, again in ((made.float, made.plain), (made.int8, made.quantized(tmp_path))):
        assert [sha256(file) for file in again.files] == [sha256(file) for file in first.files]


def test_requirements_name_runtime_version_and_operators(made: Made) -> None:
    needs = made.backend.requirements(made.int8.path)
    assert set(needs) == {"runtime", "minimum_version", "delegates", "operators"}
    assert needs["minimum_version"][0].isdigit()
    assert needs["operators"] or needs["delegates"]


def test_recipe_decides_what_is_quantized(made: Made, tmp_path: Path) -> None:
    linear_only = made.quantized(tmp_path, ("linear",))
    assert sqnr_db(made.run(linear_only), made.expected) > sqnr_db(made.run(made.int8), made.expected)
    assert made.int8.size_bytes < linear_only.size_bytes < made.float.size_bytes


@pytest.mark.parametrize("precision", ["w4a8", "int4", "fp16", "bf16"])
def test_other_precisions(made: Made, small: Small, precision: str, tmp_path: Path) -> None:
    if precision not in made.backend.PRECISIONS:
        pytest.skip(f"{made.int8.backend} cannot make {precision}")
    recipe, calibrated = small.nearest(precision)
    artifact = lower_quantized(made.float.backend, calibrated, made.info, recipe, tmp_path)
    assert artifact.path.name.startswith(f"model.{precision}.")
    noise = sqnr_db(made.run(artifact), made.expected)
    low, high = {"fp16": (50, 100), "bf16": (35, 60)}.get(precision, (10, 60))
    assert low < noise < high
    assert artifact.size_bytes < made.float.size_bytes


@pytest.mark.parametrize("operator", ["attention", "residual"])
def test_more_operators_still_work(made: Made, operator: str, tmp_path: Path) -> None:
    if operator not in made.backend.INTEGER_OPERATORS:
        pytest.skip(f"{made.int8.backend} has no integer kernels for {operator}")
    artifact = made.quantized(tmp_path, ("linear", "conv", operator))
    answers = made.run(artifact)
    assert sqnr_db(answers, made.expected) > 15
    assert not np.array_equal(answers, made.run(made.int8))
