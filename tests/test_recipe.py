"""Recipes: the shipped ones, and what a mistake in one's own says."""

from pathlib import Path

import pytest
import yaml

from gcvit_edge.backends import load_backend
from gcvit_edge.errors import UserError
from gcvit_edge.recipe import Recipe, parse_recipe, recipe_names, recipe_text

MINIMAL = {"name": "mine", "description": "a test"}


def parse(**changes: object) -> Recipe:
    return parse_recipe(yaml.safe_dump(MINIMAL | changes), "mine.yaml")


def test_a_recipe_is_shipped() -> None:
    assert "int8_ptq" in recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_named_after_their_file(name: str) -> None:
    recipe = parse_recipe(recipe_text(name), name)
    assert recipe.name == name
    assert recipe.description
    assert all(recipe.precision in load_backend(backend).PRECISIONS for backend in recipe.backends)
    assert recipe.calibration.images >= 16


def test_int8_ptq_asks_for_what_it_documents() -> None:
    recipe = parse_recipe(recipe_text("int8_ptq"), "int8_ptq")
    assert recipe.operators == ("linear", "conv")
    assert recipe.backends == ("executorch", "openvino", "onnx")
    assert (recipe.calibration.images, recipe.calibration.seed) == (128, 0)
    assert recipe.limits.max_drop <= 1.0
    assert recipe.limits.min_agreement >= 0.97


def test_defaults() -> None:
    recipe = parse()
    assert recipe.operators == ("linear", "conv")
    assert recipe.backends == ("executorch", "openvino", "onnx")
    assert recipe.calibration.images == 128
    assert recipe.limits.max_drop == 0.5


def test_channels_are_made_fit_for_integers_where_there_are_some() -> None:
    for precision, expected in {"int8": True, "int4": True, "bf16": False, "fp16": False}.items():
        recipe = parse(precision=precision)
        assert (recipe.centering, recipe.smoothing, recipe.equalization) == (expected,) * 3


@pytest.mark.parametrize("name", recipe_names())
def test_all_that_a_recipe_says_is_the_recipe(name: str) -> None:
    """With every default, as `recipes show --json` prints it."""
    recipe = parse_recipe(recipe_text(name), name)
    assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_recipes_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operaters": ["linear"]}, r"unknown key 'operaters'; did you mean 'operators'\?"),
        ({"calibration": {"imgaes": 10}}, r"unknown key 'calibration\.imgaes'; did you mean 'images'\?"),
        ({"limits": {"max_drops": 1}}, r"unknown key 'limits\.max_drops'; did you mean 'max_drop'\?"),
        (
            {"qqqq": 1},
            "unknown key 'qqqq'; valid keys: name, description, precision, operators, backends, x86, centering, smoothing, equalization, "
            "rounding, bias_correction, keep_float, search, calibration, qat, limits",
        ),
        ({"calibration": {"zzzz": 1}}, r"unknown key 'calibration\.zzzz'; valid keys: images, seed"),
        ({"calibration": {"images": "many"}}, r"calibration\.images: got 'many'; .*integer"),
        ({"calibration": {"images": 0}}, r"calibration\.images: got 0; .*greater than or equal to 16"),
        ({"calibration": {"seed": -1}}, r"calibration\.seed: got -1; .*greater than or equal to 0"),
        ({"calibration": 5}, "calibration: got 5; "),
        ({"calibration": None}, "calibration: got None; "),
        ({"operators": ["linear", "softmax"]}, r"operators\.1: got 'softmax'; .*'linear', 'conv', 'attention' or 'residual'"),
        ({"operators": []}, "operators: got .*; .*at least 1"),
        ({"operators": "linear"}, "operators: got 'linear'; "),
        ({"backends": []}, "backends: "),
        ({"precision": "int3"}, "precision: got 'int3'; .*'int8'"),
        ({"limits": {"min_agreement": 98.5}}, r"limits\.min_agreement: got 98\.5; .*less than or equal to 1"),
        ({"limits": {"max_drop": "little"}}, r"limits\.max_drop: got 'little'"),
        ({"name": "My Recipe"}, "name: got 'My Recipe'"),
        (
            {"rounding": "adaptive", "operators": ["residual"]},
            r"adaptive` is for linears and convolutions, not for residual in int8; leave it out",
        ),
        ({"rounding": "adaptive", "qat": {}}, "`qat` trains weights as they are rounded to the nearest; leave out `rounding: ad"),
        ({"bias_correction": True, "precision": "fp16"}, "`bias_correction` is for linears in integers, not for linear, conv in fp16"),
        ({"bias_correction": True, "operators": ["conv"]}, "not for conv in int8"),
        ({"bias_correction": True, "rounding": "adaptive"}, "`rounding: adaptive` leaves no mean error for `bias_correction`"),
        ({"rounding": "sequential", "search": {}}, "`rounding: sequential` fits layers to rounded ones .*take `rounding: adaptive`"),
        ({"rounding": "sequential", "bias_correction": True}, "`rounding: sequential` leaves no mean error for `bias_correction`"),
        ({"bias_correction": True, "qat": {}}, "`qat` trains biases too; leave out `bias_correction`, or `qat`"),
        (
            {"calibration": {"unit_softmax": True}},
            "`calibration.unit_softmax` is for the softmax in integers, not for linear, conv in int8; leave it out, or add `attention`",
        ),
        (
            {"calibration": {"unit_softmax": True}, "operators": ["linear", "attention"], "qat": {}},
            "`qat` trains the range of the softmax too; leave out `calibration.unit_softmax`, or `qat`",
        ),
        (
            {"precision": "bf16", "equalization": True},
            "valid:\n  `equalization` makes channels fit for integers, which bf16 has none of; leave it out$",
        ),
        (
            {"precision": "int4", "backends": ["onnx"], "calibration": {"ranges": "mse"}},
            "`calibration.ranges` is for activations in integers, which int4 leaves in float; leave it out",
        ),
        ({"search": {"images": 60, "ranked_by": 100}}, "search: `ranked_by` is a number of the `images`, of which there are 60, got 100$"),
        ({"x86": "avx512"}, "x86: got 'avx512'; .*'vnni' or 'avx2'"),
        ({"x86": "avx2", "precision": "w4a8", "backends": ["onnx"]}, "avx2` is for linears in INT8, not for linear, conv in w4a8; leave"),
        ({"x86": "avx2", "operators": ["conv"]}, "`x86: avx2` is for linears in INT8, not for conv in int8; leave it out"),
        ({"precision": "bf16", "operators": ["linear", "residual"]}, "residual rounds activations, which bf16 leaves in float"),
    ],
)
def test_mistakes_are_explained(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(**changes)
    assert str(caught.value).startswith("recipe mine.yaml is not valid:\n")


def test_every_mistake_is_listed() -> None:
    with pytest.raises(UserError) as caught:
        parse(operaters=1, calibration={"images": "many"}, limits={"min_agreement": 2})
    assert len(str(caught.value).splitlines()) == 4


def test_missing_keys() -> None:
    with pytest.raises(UserError, match="key 'name' is missing\n  key 'description' is missing"):
        parse_recipe("precision: int8", "mine.yaml")


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- a\n- b", "list"), ("just words", "str"), ("5", "int")])
def test_not_a_mapping(text: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"recipe mine.yaml must be a mapping of keys to values, got {kind}"):
        parse_recipe(text, "mine.yaml")


def test_a_section_that_is_there_twice_is_refused() -> None:
    """Else the first would be lost without a word."""
    text = recipe_text("int8_ptq") + "\ncalibration:\n  images: 64\n"
    with pytest.raises(UserError, match=r"(?s)recipe mine\.yaml is not valid YAML: the key calibration is there twice.*line \d+"):
        parse_recipe(text, "mine.yaml")
    with pytest.raises(UserError, match="the key images is there twice"):
        parse_recipe("name: mine\ndescription: x\ncalibration: {images: 64, images: 32}\n", "mine.yaml")


@pytest.mark.parametrize("text", ["name: [a", "name: 'a", "\tname: a", "a: b: c", "name: \x00"])
def test_not_yaml(text: str) -> None:
    with pytest.raises(UserError, match=r"recipe mine\.yaml is not valid YAML: "):
        parse_recipe(text, "mine.yaml")


def test_keys_that_are_no_text() -> None:
    with pytest.raises(UserError, match=r"recipe mine\.yaml is not valid"):
        parse_recipe("name: a\ndescription: b\n5: c\n", "mine.yaml")


def test_yaml_does_not_run_code() -> None:
    with pytest.raises(UserError, match="is not valid YAML"):
        parse_recipe("name: !!python/object/apply:os.system ['true']", "mine.yaml")


@pytest.mark.parametrize("name", ["int8_ptqq", "int8-ptq", "INT8_PTQ"])
def test_unknown_recipe_names_the_nearest(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown recipe '{name}'; did you mean 'int8_ptq'\\? known: .*int8_ptq"):
        recipe_text(name)


def test_unknown_recipe_far_from_all_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'zzz'; known: .*int8_ptq"):
        recipe_text("zzz")


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_recipe_file(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"mine.{suffix}"
    file.write_text("name: mine\ndescription: größer\n", encoding="utf-8")
    assert parse_recipe(recipe_text(str(file)), str(file)).description == "größer"


def test_missing_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe file .*none\.yaml does not exist"):
        recipe_text(str(tmp_path / "none.yaml"))


def test_recipe_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes("name: mine\ndescription: größer\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"mine\.yaml"):
        recipe_text(str(file))
