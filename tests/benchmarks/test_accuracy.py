"""Which rows of an earlier run are taken over."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from interrupted import interrupted_writing
from programs import benchmark_program


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    return benchmark_program("accuracy")


def named(accuracy: ModuleType, name: str) -> Any:
    return next(row for row in accuracy.ROWS if row.name == name)


def entries(row: Any, **made_by: str) -> list[dict[str, Any]]:
    return [{"row": row.name, "backend": backend, **made_by} for backend in ("onnx", "openvino")]


def answers(right: int, images: int) -> SimpleNamespace:
    """What `check_rows` looks at: float logits that are right on the first so many images."""
    classes = np.zeros(images, np.int64)
    return SimpleNamespace(classes=classes, reference=np.eye(2, dtype=np.float32)[(np.arange(images) >= right).astype(int)])


def test_a_row_is_taken_over_if_recipe_code_and_versions_are_the_same(accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    row = named(accuracy, "int8_ptq")
    made = entries(row, made_by=accuracy.made_by(row, "these"))
    assert accuracy.reusable(row, "these", made, again=True)
    assert not accuracy.reusable(row, "other weights", made, again=False)
    assert not accuracy.reusable(row, "these", [], again=False)
    assert not accuracy.reusable(accuracy.replace(row, change=accuracy.calibration(seed=1)), "these", made, again=False)
    assert not accuracy.reusable(row, "these", [made[0], made[1] | {"made_by": "other"}], again=False)
    for name in ("sources", "package_version"):
        with monkeypatch.context() as patch:
            patch.setattr(accuracy, name, lambda *_: "other")
            assert not accuracy.reusable(row, "these", made, again=False)


def test_a_row_that_does_not_say_what_made_it_is_named(accuracy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    row = named(accuracy, "int8_ptq")
    assert accuracy.reusable(row, "these", entries(row), again=False)
    assert "int8_ptq: not checked whether recipe, code and versions are the same; --again measures it anew" in capsys.readouterr().err
    assert not accuracy.reusable(row, "these", entries(row), again=True)


@pytest.mark.parametrize("right", [598, 599, 600, 601, 602])
def test_rows_of_another_float_model_are_refused_but_not_those_of_another_cpu(accuracy: ModuleType, right: int) -> None:
    """600 of 1,000 images were right, of which another CPU may turn one."""
    row = accuracy.Row("int8_ptq", "int8_ptq", every=1)
    bed = answers(right, 1000)
    measured = [{"row": row.name, "images": 1000, "float_top1": 0.6}]
    if abs(right - 600) <= 1:
        accuracy.check_rows(measured, bed, Path("rows.json"))
    else:
        message = (
            rf"other --weights or --eval, such as 'int8_ptq': float top-1 60\.00% on 1000 images, here {right / 10:.2f}% on 1000; give"
        )
        with pytest.raises(SystemExit, match=message):
            accuracy.check_rows(measured, bed, Path("rows.json"))


def test_rows_of_other_images_are_refused(accuracy: ModuleType) -> None:
    fifth = [{"row": "int8_ptq, every fifth image", "images": 200, "float_top1": 1.0}]
    accuracy.check_rows(fifth, answers(1000, 1000), Path("rows.json"))
    with pytest.raises(SystemExit, match=r"on 200 images, here 100\.00% on 400; give"):
        accuracy.check_rows(fifth, answers(2000, 2000), Path("rows.json"))


def test_unknown_rows_are_refused(accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"row": "int8_ptqq"}]))
    arguments = ["accuracy.py", "--weights", "x", "--train", "x", "--eval", "x"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(file)])
    with pytest.raises(SystemExit, match=r"rows\.json: unknown row 'int8_ptqq'; did you mean 'int8_ptq'\?"):
        accuracy.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "int8_qat"])
    with pytest.raises(SystemExit, match="--only: unknown row 'int8_qat'; did you mean"):
        accuracy.main()


def test_what_was_measured_outlives_an_interruption(accuracy: ModuleType, tmp_path: Path) -> None:
    row, file = named(accuracy, "int8_ptq"), tmp_path / "rows.json"
    accuracy.save(entries(row), file)
    with interrupted_writing():
        accuracy.save(entries(row, made_by="this"), file)
    assert json.loads(file.read_text()) == entries(row)
    assert list(tmp_path.iterdir()) == [file]


def test_every_row_has_a_recipe_that_is_valid(accuracy: ModuleType) -> None:
    for row in accuracy.ROWS:
        recipe = accuracy.recipe_of(row)
        assert accuracy.Recipe.model_validate(recipe.model_dump()) == recipe, row.name
