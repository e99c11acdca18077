"""The embedded sample: its archives, its manifest, and that it can be made again to the byte."""

import csv
import hashlib
import runpy
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from gcvit_edge.data import class_indices, find_images
from gcvit_edge.resources import resource_dir

CALIB = Path(__file__).parents[1] / "calib"
ORIGINALS = Path(__file__).parents[2] / "shared" / "data" / "fashion_mnist"
COUNTS = {"calib.zip": 300, "train.zip": 1000, "eval.zip": 2000}
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (CALIB / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def contents() -> dict[str, dict[str, str]]:
    """SHA-256 of every file of every archive."""
    out: dict[str, dict[str, str]] = {}
    for name in COUNTS:
        with zipfile.ZipFile(CALIB / name) as archive:
            out[name] = {file: hashlib.sha256(archive.read(file)).hexdigest() for file in archive.namelist()}
    return out


def test_the_checkout_uses_its_own_sample() -> None:
    assert resource_dir("calib").resolve() == CALIB.resolve()


def test_manifest_has_the_hash_of_every_file(rows: list[dict[str, str]], contents: dict[str, dict[str, str]]) -> None:
    listed = {(row["archive"], row["file"]): row["sha256"] for row in rows}
    assert len(listed) == len(rows)
    assert listed == {(name, file): digest for name, files in contents.items() for file, digest in files.items()}


def test_manifest_has_the_class_of_every_file(rows: list[dict[str, str]]) -> None:
    assert {row["class"] for row in rows} == set(CLASSES)
    assert all(row["file"].split("/")[0] == row["class"].replace("/", "_") for row in rows)


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_archives_are_balanced(name: str, count: int, contents: dict[str, dict[str, str]]) -> None:
    per_class = Counter(file.split("/")[0] for file in contents[name])
    assert per_class == {c.replace("/", "_"): count // 10 for c in CLASSES}


def test_no_image_is_both_calibration_and_training(contents: dict[str, dict[str, str]]) -> None:
    calib, train, evaluation = (set(contents[name].values()) for name in COUNTS)
    assert not calib & train
    assert not calib & evaluation
    assert not train & evaluation


def test_parts_come_from_the_published_splits(contents: dict[str, dict[str, str]]) -> None:
    for name, split in (("calib.zip", "train-"), ("train.zip", "train-"), ("eval.zip", "t10k-")):
        assert all(file.split("/")[1].startswith(split) for file in contents[name])


def test_images_are_readable_and_of_the_models_classes() -> None:
    from gcvit_edge.model.create import load_model
    from gcvit_edge.plan import sample_weights

    _, info = load_model(str(sample_weights(None)))
    assert info.labels.names == CLASSES
    assert info.name == "gcvit_xxtiny"
    assert info.origin.licence == "Apache-2.0"
    for name, count in COUNTS.items():
        indices = class_indices(find_images(CALIB / name, "sample"), info.labels)
        assert Counter(indices.tolist()) == dict.fromkeys(range(10), count // 10)


def test_licence_of_the_images_is_there() -> None:
    text = (CALIB / "LICENSE.fashion-mnist.txt").read_text(encoding="utf-8")
    assert "MIT" in text
    assert "Zalando" in text


def test_sample_is_rebuilt_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ORIGINALS.is_dir():
        pytest.skip(f"the original files of Fashion-MNIST are not in {ORIGINALS}")
    script = tmp_path / "make_sample.py"
    script.write_text((CALIB / "make_sample.py").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(script), "--fashion-mnist", str(ORIGINALS)])
    runpy.run_path(str(script), run_name="__main__")
    assert {path.name for path in tmp_path.iterdir()} == {"make_sample.py", "manifest.csv", *COUNTS}
    for name in (*COUNTS, "manifest.csv"):
        assert (tmp_path / name).read_bytes() == (CALIB / name).read_bytes(), name
