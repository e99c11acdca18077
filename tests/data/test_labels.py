"""Label files of every form."""

import json
from pathlib import Path

import pytest

from gcvit_edge.data import Labels, read_labels
from gcvit_edge.errors import UserError

FOLDERS = ("n01440764", "n01443537")
NAMES = ("tench", "goldfish, Carassius auratus")


@pytest.mark.parametrize(
    ("name", "text", "folders"),
    [
        ("a.txt", "tench\ngoldfish, Carassius auratus\n", NAMES),
        ("a.txt", "tench\r\n\r\ngoldfish, Carassius auratus", NAMES),
        ("a.txt", "n01440764\ttench\nn01443537\tgoldfish, Carassius auratus\n", FOLDERS),
        ("a.json", json.dumps(NAMES), NAMES),
        ("a.json", json.dumps([{"wnid": w, "name": n} for w, n in zip(FOLDERS, NAMES, strict=True)]), FOLDERS),
        ("a.json", json.dumps({"id2label": {"1": NAMES[1], "0": NAMES[0]}, "model_type": "x"}), NAMES),
        ("a.json", json.dumps({"classes": NAMES}), NAMES),
        ("a.json", json.dumps({"classes": [{"wnid": w, "name": n} for w, n in zip(FOLDERS, NAMES, strict=True)]}), FOLDERS),
    ],
)  # fmt: skip
def test_read_labels(name: str, text: str, folders: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    labels = read_labels(tmp_path / name)
    assert labels.names == NAMES
    assert labels.folders == folders


def test_id2label_is_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"id2label": {str(i): f"class {i}" for i in sorted(range(12), key=str)}}))
    assert read_labels(file).names == tuple(f"class {i}" for i in range(12))


def test_names_of_a_model_or_of_folders_have_one_line() -> None:
    with pytest.raises(UserError, match=r"a class name of several lines, 'cat\\ndog'"):
        Labels.of(["bird", "cat\ndog"])


def test_slashes_do_not_reach_folder_names(tmp_path: Path) -> None:
    assert Labels.of(["T-shirt/top", "Bag"]).folders == ("T-shirt_top", "Bag")
    (tmp_path / "labels.txt").write_text("T-shirt/top\nBag\n")
    assert read_labels(tmp_path / "labels.txt") == Labels.of(["T-shirt/top", "Bag"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "is empty; write one class name a line"),
        ("a.json", "[]", "no list of class names"),
        ("a.json", '{"a": "b"}', "no list of class names"),
        ("a.json", "[1, 2]", "no list of class names"),
        ("a.json", "[{", "is not JSON"),
        ("a.json", "5", "no list of class names"),
        ("a.json", "null", "no list of class names"),
        ("a.json", '"cat"', "no list of class names"),
        ("a.json", '{"classes": 3}', "no list of class names"),
        ("a.json", '["cat\\ndog", "bird"]', r"a class name of several lines, 'cat\\ndog'"),
        ("a.json", '["cat\\n", "bird"]', r"a class name of several lines, 'cat\\n'"),
        ("a.json", '[{"wnid": "n1", "name": 5}]', "no list of class names"),
    ],
)
def test_unusable_labels(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_labels(tmp_path / name)


def test_labels_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels file .*none\.txt does not exist"):
        read_labels(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("Köln".encode("latin-1"))
    with pytest.raises(UserError, match="cannot read labels"):
        read_labels(tmp_path / "latin.txt")
