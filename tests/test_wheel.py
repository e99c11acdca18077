"""The built wheel, installed apart from this checkout, does the same: recipes and samples travel as package data."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "gcvit_edge/_resources/recipes/int8_ptq.yaml" in names
    assert "gcvit_edge/_resources/calib/eval.zip" in names
    assert "gcvit_edge/report/templates/card.md.j2" in names
    assert {f"gcvit_edge/native/{name}" for name in ("runner.cpp", "energy.h", "CMakeLists.txt", "aarch64.cmake", "count.c")} <= set(names)
    assert {f"gcvit_edge/targets/web/{name}" for name in ("page.html", "page.js")} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "results/", "scripts/"))]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, "-m", "gcvit_edge", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_it_is_the_installed_package_that_runs(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = "import gcvit_edge; print(gcvit_edge.__file__)"
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert where.startswith(str(installed))


def test_plan_on_the_embedded_sample_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "quantize", "--recipe", "int8_ptq", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert (planned["model"], planned["evaluation_images"], planned["licence"]) == ("gcvit_xxtiny", 2000, "Apache-2.0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_quantize_and_predict_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "quantize", "--recipe", "int8_ptq", "--backends", "onnx", "--eval-images", "500", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["artifacts"][0]["agreement"] >= 0.985
    with zipfile.ZipFile(installed / "gcvit_edge" / "_resources" / "calib" / "eval.zip") as archive:
        name = next(name for name in archive.namelist() if name.startswith("Trouser/"))
        (tmp_path / "image.png").write_bytes(archive.read(name))
    predicted = run(installed, tmp_path, "predict", "gcvit_xxtiny.int8_ptq", "image.png", "--json", "--top", "1")
    assert json.loads(predicted.stdout)[0]["classes"][0]["label"] == "Trouser", predicted.stderr
