"""Folders and archives of images: finding, classes, selecting."""

import os
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import noise, save_all, zipped

from gcvit_edge.data import ImageFolder, Labels, check_depth, class_indices, find_images, has_all_classes
from gcvit_edge.errors import UserError

FOLDERS = ("n01440764", "n01443537")
NAMES = ("tench", "goldfish, Carassius auratus")


# finding


def test_folder_and_zip_list_the_same(tmp_path: Path) -> None:
    root = tmp_path / "images"
    save_all(root, {"b/2.png": noise(4, 4), "a/1.JPG": noise(4, 4), "a/deep/3.webp": noise(4, 4)})
    (root / "a" / "notes.txt").write_text("no image")
    (root / "empty").mkdir()
    folder, archive = find_images(root, "evaluation"), find_images(zipped(root, tmp_path / "images.zip"), "evaluation")
    assert folder.files == archive.files == ("a/1.JPG", "a/deep/3.webp", "b/2.png")
    assert folder.classes == archive.classes == ("a", "a", "b")


def test_images_in_the_root_have_no_class(tmp_path: Path) -> None:
    save_all(tmp_path, {"1.png": noise(4, 4), "a/2.png": noise(4, 4)})
    assert find_images(tmp_path, "calibration").classes == ("", "a")


def test_missing_empty_and_neither(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"calibration folder .*nowhere does not exist; give a folder \(or \.zip\)"):
        find_images(tmp_path / "nowhere", "calibration")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"evaluation folder .*empty holds no image \(\.avif, \.bmp, "):
        find_images(tmp_path / "empty", "evaluation")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="text is neither a folder nor a zip archive"):
        find_images(tmp_path / "text", "evaluation")
    with zipfile.ZipFile(tmp_path / "no_images.zip", "w") as archive:
        archive.writestr("a/readme.txt", "x")
    with pytest.raises(UserError, match="holds no image"):
        find_images(tmp_path / "no_images.zip", "evaluation")


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    save_all(tmp_path, {"elsewhere/1.png": noise(4, 4), "images/b/2.png": noise(4, 4)})
    root = tmp_path / "images"
    for name in ("a", "c"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    (root / "b" / "3.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert find_images(root, "calibration").files == ("a/1.png", "b/2.png", "b/3.png", "c/1.png")
    (tmp_path / "all").symlink_to(root)
    assert find_images(tmp_path / "all", "calibration").files == ("a/1.png", "b/2.png", "b/3.png", "c/1.png")


def test_links_that_lead_back_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_all(tmp_path, {"images/a/1.png": noise(4, 4), "images/b/2.png": noise(4, 4)})
    for name, target in {"a/self": "a", "a/up": ".", "a/outside": "..", "a/other": "b", "b/other": "a"}.items():
        (tmp_path / "images" / name).symlink_to((tmp_path / "images" / target).resolve())
    files = ("a/1.png", "a/other/2.png", "b/2.png", "b/other/1.png")
    assert find_images(tmp_path / "images", "calibration").files == files
    monkeypatch.chdir(tmp_path / "images")
    assert find_images(Path("."), "calibration").files == files


def test_what_programs_leave_beside_images_is_none(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "images"
    names = ("a/1.png", "a/.ipynb_checkpoints/1-checkpoint.png", "a/._1.png", ".Trash/2.png", "__MACOSX/a/1.png")
    save_all(root, {name: noise(4, 4) for name in names})
    (root / "a" / "no.png").mkdir()
    archive = zipped(root, tmp_path / "images.zip")
    assert find_images(root, "calibration").files == find_images(archive, "calibration").files == ("a/1.png",)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [("flag", 1, "is encrypted, password required"), ("method", 9, "compression method is not supported")],  # 9: Deflate64
)
def test_a_zip_that_python_cannot_read(where: str, value: int, message: str, tmp_path: Path) -> None:
    save_all(tmp_path, {"images/a/1.png": noise(4, 4)})
    file = zipped(tmp_path / "images", tmp_path / "images.zip")
    data = bytearray(file.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.rindex(signature) + offset + {"flag": 0, "method": 2}[where]] = value
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"calibration images: .*images\.zip cannot be read \(.*{message}.*\); unpack it and give the"):
        find_images(file, "calibration")


def test_a_zip_with_a_damaged_directory(tmp_path: Path) -> None:
    save_all(tmp_path, {"images/a/1.png": noise(4, 4)})
    file = zipped(tmp_path / "images", tmp_path / "images.zip")
    file.write_bytes(file.read_bytes().replace(b"PK\1\2", b"PK\0\0"))
    with pytest.raises(UserError, match=r"images\.zip cannot be read"):
        find_images(file, "calibration")


# classes


def image_folder(*classes: str) -> ImageFolder:
    return ImageFolder(Path("val"), tuple(f"{c}/{i}.png" if c else f"{i}.png" for i, c in enumerate(classes)), classes)


def test_class_indices_by_folder_and_by_name() -> None:
    labels = Labels(names=NAMES, folders=FOLDERS)
    indices = class_indices(image_folder(FOLDERS[1], NAMES[0], FOLDERS[0]), labels)
    assert indices.tolist() == [1, 0, 0]
    assert indices.dtype == np.int64
    shirts = Labels(names=("Bag", "T-shirt/top"), folders=("n0", "n1"))
    assert class_indices(image_folder("T-shirt_top", "n0"), shirts).tolist() == [1, 0]


def test_a_folder_that_is_two_classes() -> None:
    labels = Labels.of(["crane", "tench", "crane"])  # as ImageNet's: a bird, and a machine
    assert class_indices(image_folder("tench"), labels).tolist() == [1]
    with pytest.raises(UserError, match=r"folder 'crane', but the model's classes 0 and 2 have this name; .* `folder<TAB>name`"):
        class_indices(image_folder("tench", "crane"), labels)
    told_apart = Labels(names=labels.names, folders=("crane", "tench", "machine"))
    assert class_indices(image_folder("crane", "machine"), told_apart).tolist() == [0, 2]
    with pytest.raises(UserError, match="folder 'crane'"):
        class_indices(image_folder("crane"), Labels(names=labels.names, folders=("n0", "n1", "n2")))


def test_unknown_folder_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"1 folders that are no class of the model: tullips \(did you mean 'tulips'\?\)"):
        class_indices(image_folder("tulips", "tullips"), Labels.of(["daisy", "roses", "tulips"]))


def test_unknown_folders_are_counted_and_the_classes_listed() -> None:
    with pytest.raises(UserError, match="7 folders") as caught:
        class_indices(image_folder(*"qwertyu"), Labels.of(f"class {i}" for i in range(12)))
    assert "e, q, r, t, u." in str(caught.value)  # five of them
    assert "The model's 12 classes: class 0, " in str(caught.value)
    assert "class 9, ..." in str(caught.value)
    assert "--labels" in str(caught.value)


def test_letters_of_two_parts_are_the_same_letters() -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != apart
    for label, folder in ((composed, apart), (apart, composed)):
        assert class_indices(image_folder("bar", folder), Labels.of(["bar", label])).tolist() == [0, 1]
        assert has_all_classes(image_folder("bar", folder, folder), Labels.of(["bar", label]))
    assert not has_all_classes(image_folder("bar"), Labels.of(["bar", composed]))
    assert has_all_classes(image_folder("T-shirt_top"), Labels(names=("T-shirt/top",), folders=("n1",)))


@pytest.mark.parametrize("packed", [False, True])
def test_class_folders_one_folder_deeper(packed: bool, tmp_path: Path) -> None:
    root, labels = tmp_path / "images", Labels.of(["daisy", "tulips"])
    save_all(root, {"train/daisy/1.png": noise(4, 4), "train/tulips/deep/2.png": noise(4, 4)})
    images = find_images(zipped(root, tmp_path / "images.zip") if packed else root, "calibration")
    instead = r"a \.zip of what is in train/" if packed else r".*images/train"
    for check in (check_depth, class_indices):
        with pytest.raises(UserError, match=rf"has the class folders in a folder, train, which is no class; give {instead}$"):
            check(images, labels)
    with pytest.raises(UserError, match="1 folders that are no class of the model: train"):
        class_indices(images, Labels.of(["daisy", "roses"]))
    check_depth(images, Labels.of(["daisy", "tulips", "train"]))  # a class, whatever is in its folder
    check_depth(image_folder("train"), labels)


def test_folders_without_images_are_known(tmp_path: Path) -> None:
    root = tmp_path / "images"
    save_all(root, {"a/1.jfif": noise(4, 4), "b/2.pgm": noise(4, 4), "c/3.AVIF": noise(4, 4)})
    for name in ("d", "e/deep", ".cache"):
        (root / name).mkdir(parents=True)
    (root / "e" / "raw.cr2").touch()
    assert find_images(root, "training").empty == ("d", "e")
    assert find_images(root, "training").classes == ("a", "b", "c")
    assert find_images(zipped(root, tmp_path / "images.zip"), "training").empty == ("d", "e")


def test_images_outside_class_folders() -> None:
    with pytest.raises(UserError, match=r"images outside class folders, such as 1\.png; lay them out as class/image"):
        class_indices(image_folder("daisy", ""), Labels.of(["daisy"]))


def test_names_of_a_zip_with_backslashes_are_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:
        archive.writestr("daisy/1.png", b"x")
        archive.writestr("daisy\\2.png", b"x")
    with pytest.raises(UserError, match=r"such as daisy\\2\.png; its names have \\ for /: unpack it, and zip it again"):
        class_indices(find_images(tmp_path / "old.zip", "training"), Labels.of(["daisy"]))


# selecting


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    count=st.integers(1, 80),
    seed=st.integers(0, 2**32 - 1),
)
def test_select_is_balanced_within_one(sizes: list[int], count: int, seed: int) -> None:
    images = image_folder(*(f"class{c}" for c, size in enumerate(sizes) for _ in range(size)))
    chosen = images.select(count, seed)
    assert len(chosen.files) == min(count, sum(sizes))
    assert len(set(chosen.files)) == len(chosen.files)
    assert [f.split("/")[0] for f in chosen.files] == list(chosen.classes)
    assert images.select(count - 1, seed).files == chosen.files[: count - 1]
    taken = [chosen.classes.count(f"class{c}") for c in range(len(sizes))]
    most = max(taken)
    assert all(got == size or got >= most - 1 for got, size in zip(taken, sizes, strict=True))  # a class may run out


def test_select_is_seeded() -> None:
    images = image_folder(*(name for name in "abcd" for _ in range(50)))
    first = images.select(20, 3)
    assert first == images.select(20, 3)
    assert first.files != images.select(20, 4).files
    assert {first.classes.count(name) for name in "abcd"} == {5}


def test_fewer_images_than_classes_are_of_any_classes() -> None:
    images = image_folder(*(f"{index:03}" for index in range(200) for _ in range(3)))
    first, second = (images.select(50, seed) for seed in (0, 1))
    assert len(set(first.classes)) == len(set(second.classes)) == 50
    assert set(first.classes) != set(second.classes)
    assert max(first.classes) > "150"


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    save_all(tmp_path, {"a/1.png": noise(4, 4)})
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / os.fsdecode(b"caf\xe9.png"))
    with pytest.raises(UserError, match=r"calibration images: the name 'a/caf\\udce9\.png' in .* is not UTF-8; rename it"):
        find_images(tmp_path, "calibration")
