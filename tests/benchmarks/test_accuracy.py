"""Which rows of an earlier run are taken over."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    if not FILE.is_file():
        pytest.skip("a source distribution has no benchmarks")
    spec = importlib.util.spec_from_file_location("benchmark_of_accuracy", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FILE.parent)  # as Python does for a script
        spec.loader.exec_module(module)
    return module


def named(accuracy: ModuleType, name: str) -> Any:
    return next(row for row in accuracy.ROWS if row.name == name)


def entries(row: Any, **made_by: str) -> list[dict[str, Any]]:
    return [{"row": row.name, "backend": backend, **made_by} for backend in ("onnx", "openvino")]


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


def test_every_row_has_a_recipe_that_is_valid(accuracy: ModuleType) -> None:
    for row in accuracy.ROWS:
        recipe = accuracy.recipe_of(row)
        assert accuracy.Recipe.model_validate(recipe.model_dump()) == recipe, row.name
