"""Preprocessing by the documented rule, label files, folders and archives of images, decoding."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from gcvit_edge.data import (
    ImageFolder,
    Labels,
    Preprocessing,
    class_indices,
    decode_images,
    default_preprocessing,
    find_images,
    inputs,
    read_image,
    read_labels,
    read_preprocessing,
)
from gcvit_edge.errors import UserError

TORCHVISION = {
    "nearest": transforms.InterpolationMode.NEAREST,
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
}
EXIF_ORIENTATION = 0x0112
SMALL = Preprocessing(size=(8, 8), resize=8)


def noise(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    shape = {"L": (height, width), "RGB": (height, width, 3), "RGBA": (height, width, 4)}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8), mode)


def specified_pixels(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The documented rule (longer side rounded, crop offset rounded down), by torchvision's resize and crop."""
    short, long = sorted(image.size)
    long = round(preprocessing.resize * long / short)
    shape = (long, preprocessing.resize) if image.height > image.width else (preprocessing.resize, long)
    resized = transforms.functional.resize(image, list(shape), TORCHVISION[preprocessing.interpolation])
    height, width = preprocessing.size
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    return np.asarray(transforms.functional.crop(resized, top, left, height, width))


def save_all(root: Path, files: dict[str, Image.Image]) -> None:
    for name, image in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)


def zipped(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for path in sorted(folder.rglob("*")):
            out.write(path, path.relative_to(folder).as_posix())
    return archive


# pixels


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(
    "image_size",
    [(256, 256), (300, 256), (256, 301), (500, 375), (375, 500), (333, 257), (1001, 61), (61, 1001), (28, 28), (31, 17), (1, 1)],
)
def test_pixels_follow_the_rule(image_size: tuple[int, int], interpolation: str) -> None:
    preprocessing = Preprocessing(interpolation=interpolation)
    image = noise(*image_size)
    pixels = preprocessing.pixels(image)
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, specified_pixels(image, preprocessing))


@pytest.mark.parametrize(
    ("size", "resize"),
    [((224, 224), 224), ((224, 224), 225), ((224, 224), 226), ((224, 224), 227), ((63, 33), 73), ((33, 63), 74), ((96, 64), 97)],
)
@pytest.mark.parametrize("image_size", [(229, 229), (257, 301), (302, 257), (120, 77)])
def test_odd_margins(size: tuple[int, int], resize: int, image_size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(size=size, resize=resize)
    image = noise(*image_size)
    np.testing.assert_array_equal(preprocessing.pixels(image), specified_pixels(image, preprocessing))


def test_equal_to_torchvision_where_nothing_is_rounded() -> None:
    image, preprocessing = noise(512, 384), Preprocessing(size=(224, 224), resize=240)  # 320x240, margins 96 and 16
    steps = transforms.Compose([transforms.Resize(240, TORCHVISION["bicubic"]), transforms.CenterCrop(224)])
    np.testing.assert_array_equal(preprocessing.pixels(image), np.asarray(steps(image)))


def test_half_pixel_offsets_round_down() -> None:
    image = Image.fromarray(np.arange(11 * 11 * 3, dtype=np.uint16).reshape(11, 11, 3).astype(np.uint8))
    for size, offset in ((10, 0), (8, 1), (6, 2), (4, 3)):  # margins of 1, 3, 5, 7 pixels: halves 0.5, 1.5, 2.5, 3.5
        pixels = Preprocessing(size=(size, size), resize=11).pixels(image)
        np.testing.assert_array_equal(pixels, np.asarray(image)[offset : offset + size, offset : offset + size])


def test_longer_side_is_rounded() -> None:
    image = noise(320, 231)  # 256 * 320 / 231 = 354.6
    pixels = Preprocessing(size=(256, 355), resize=256).pixels(image)
    np.testing.assert_array_equal(pixels, np.asarray(image.resize((355, 256), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("size", [(40, 41), (41, 40), (45, 45), (30, 64), (35, 39)])
@pytest.mark.parametrize("image_size", [(50, 50), (61, 50), (50, 77)])
def test_crop_beyond_the_image_is_padded(size: tuple[int, int], image_size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(size=size, resize=32)
    image = noise(*image_size)
    np.testing.assert_array_equal(preprocessing.pixels(image), specified_pixels(image, preprocessing))


def test_squash_resizes_straight_to_the_size() -> None:
    preprocessing = Preprocessing(size=(48, 64), resize=999, mode="squash")
    image = noise(131, 77)
    expected = transforms.Resize((48, 64), transforms.InterpolationMode.BICUBIC)(image)
    np.testing.assert_array_equal(preprocessing.pixels(image), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.asarray(noise(48, 32))
    # how a camera stores an upright image under each orientation tag (EXIF 2.3, table 4.6.4)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: np.rot90(upright, -1),
    }  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    preprocessing = Preprocessing(size=(32, 48), resize=32)
    np.testing.assert_array_equal(preprocessing.pixels(Image.open(buffer)), upright)


def test_greyscale_becomes_three_equal_channels() -> None:
    image = noise(16, 16, mode="L")
    pixels = Preprocessing(size=(16, 16), resize=16).pixels(image)
    for channel in range(3):
        np.testing.assert_array_equal(pixels[:, :, channel], np.asarray(image))


def test_alpha_is_dropped() -> None:
    image = noise(16, 16, mode="RGBA")
    np.testing.assert_array_equal(Preprocessing(size=(16, 16), resize=16).pixels(image), np.asarray(image)[:, :, :3])


def test_palette_is_resolved_before_resizing() -> None:
    palette = noise(40, 40).quantize(16)
    assert palette.mode == "P"
    preprocessing = Preprocessing(size=(16, 16), resize=20)
    np.testing.assert_array_equal(preprocessing.pixels(palette), specified_pixels(palette.convert("RGB"), preprocessing))


def test_normalize_gives_channels_first_float32() -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[1, 2] = (255, 51, 0)
    out = Preprocessing(mean=(0.5, 0.25, 0.125), std=(0.5, 0.1, 0.25)).normalize(pixels)
    assert out.shape == (1, 3, 2, 3)
    assert out.dtype == np.float32
    assert out.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(out[0, :, 1, 2], [1.0, -0.5, -0.5], atol=1e-6)
    np.testing.assert_allclose(out[0, :, 0, 0], [-1.0, -2.5, -0.5], atol=1e-6)


def test_normalize_equals_torchvision() -> None:
    image, preprocessing = noise(20, 20), Preprocessing(size=(20, 20), resize=20)
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)])
    np.testing.assert_allclose(preprocessing.normalize(preprocessing.pixels(image))[0], steps(image).numpy(), rtol=0, atol=1e-6)


def test_default_preprocessing_is_timms() -> None:
    assert default_preprocessing((224, 224), 0.875).resize == 256
    assert default_preprocessing((64, 64), 0.875).resize == 73
    assert default_preprocessing((512, 512), 1.0, squash=True).mode == "squash"


# preprocessor_config.json


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(),
        Preprocessing(size=(64, 96), resize=73, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        Preprocessing(size=(512, 512), resize=512, mode="squash", interpolation="nearest"),
    ],
)
def test_huggingface_round_trip(preprocessing: Preprocessing, tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(preprocessing.to_huggingface()))
    assert read_preprocessing(file) == preprocessing


def test_huggingface_form() -> None:
    data = Preprocessing(size=(64, 96), resize=73).to_huggingface()
    assert data["image_processor_type"] == "BitImageProcessor"
    assert data["size"] == {"shortest_edge": 73}
    assert data["crop_size"] == {"height": 64, "width": 96}
    assert data["resample"] == 3
    assert data["rescale_factor"] == pytest.approx(1 / 255)


def test_old_style_config_with_plain_numbers(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"size": 256, "crop_size": 224, "resample": 2, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))
    expected = Preprocessing(size=(224, 224), resize=256, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    assert read_preprocessing(file) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "size"),
        ('{"size": {"shortest_edge": 8}, "crop_size": 8, "resample": 99, "image_mean": [0], "image_std": [1]}', "99"),
        ('{"size": 8, "crop_size": 8, "image_mean": "x", "image_std": [1]}', "mean"),
        ("[1, 2]", "preprocessor_config.json"),
        ('"text"', "preprocessor_config.json"),
    ],
)
def test_unusable_preprocessing_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_preprocessing(file)


def test_missing_preprocessing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nothing\.json"):
        read_preprocessing(tmp_path / "nothing.json")


# labels

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
        ("a.json", '[{"wnid": "n1", "name": 5}]', "no list of class names"),
    ],
)
def test_unusable_labels(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_labels(tmp_path / name)


def test_labels_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.txt as labels"):
        read_labels(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("Köln".encode("latin-1"))
    with pytest.raises(UserError, match="as labels"):
        read_labels(tmp_path / "latin.txt")


# finding images


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
    with pytest.raises(UserError, match=r"evaluation folder .*empty holds no image \(\.bmp, "):
        find_images(tmp_path / "empty", "evaluation")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="text is neither a folder nor a zip archive"):
        find_images(tmp_path / "text", "evaluation")
    with zipfile.ZipFile(tmp_path / "no_images.zip", "w") as archive:
        archive.writestr("a/readme.txt", "x")
    with pytest.raises(UserError, match="holds no image"):
        find_images(tmp_path / "no_images.zip", "evaluation")


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


def test_images_outside_class_folders() -> None:
    with pytest.raises(UserError, match=r"images outside class folders, such as 1\.png; lay them out as class/image"):
        class_indices(image_folder("daisy", ""), Labels.of(["daisy"]))


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
    taken = [chosen.classes.count(f"class{c}") for c in range(len(sizes))]
    most = max(taken)
    assert all(got == size or got >= most - 1 for got, size in zip(taken, sizes, strict=True))  # a class may run out


def test_select_is_seeded_and_keeps_the_order() -> None:
    images = image_folder(*(name for name in "abcd" for _ in range(50)))
    first = images.select(20, 3)
    assert first == images.select(20, 3)
    assert first.files != images.select(20, 4).files
    assert [images.files.index(f) for f in first.files] == sorted(images.files.index(f) for f in first.files)
    assert {first.classes.count(name) for name in "abcd"} == {5}


# decoding


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    save_all(root, {f"{name}/{i:02}.png": noise(9 + i, 8, seed=i) for i, name in enumerate("abcd" * 6)})
    return root


def test_decoded_pixels_are_those_of_each_image(photos: Path, tmp_path: Path) -> None:
    images = find_images(photos, "evaluation")
    ticks: list[int] = []
    pixels = decode_images(images, SMALL, tmp_path / "p.npy", lambda: ticks.append(1))
    loaded = pixels.load()
    assert isinstance(loaded, np.memmap)
    assert loaded.shape == (24, 8, 8, 3)
    assert loaded.dtype == np.uint8
    assert len(ticks) == 24
    assert pixels.kept.tolist() == list(range(24))
    assert pixels.skipped == ()
    for row, file in zip(loaded, images.files, strict=True):
        np.testing.assert_array_equal(row, SMALL.pixels(Image.open(photos / file)))
    fed = list(inputs(pixels, SMALL, 3))
    assert len(fed) == 3
    np.testing.assert_array_equal(fed[2], read_image(photos / images.files[2], SMALL))


def test_zip_and_folder_give_equal_pixels(photos: Path, tmp_path: Path) -> None:
    folder = decode_images(find_images(photos, "evaluation"), SMALL, tmp_path / "a.npy")
    archive = decode_images(find_images(zipped(photos, tmp_path / "photos.zip"), "evaluation"), SMALL, tmp_path / "b.npy")
    np.testing.assert_array_equal(folder.load(), archive.load())


def test_an_unreadable_image_is_skipped_and_named(photos: Path, tmp_path: Path) -> None:
    images = find_images(photos, "evaluation")
    (photos / images.files[5]).write_bytes(b"not an image")
    pixels = decode_images(images, SMALL, tmp_path / "p.npy")
    assert pixels.skipped == (images.files[5],)
    assert pixels.kept.tolist() == [i for i in range(24) if i != 5]
    assert pixels.load().shape == (23, 8, 8, 3)
    np.testing.assert_array_equal(pixels.load()[5], SMALL.pixels(Image.open(photos / images.files[6])))
    np.testing.assert_array_equal(pixels.load()[22], SMALL.pixels(Image.open(photos / images.files[23])))


def test_too_many_unreadable_images_are_an_error(photos: Path, tmp_path: Path) -> None:
    images = find_images(photos, "evaluation")
    for file in images.files[3:5]:
        (photos / file).write_bytes((photos / file).read_bytes()[:40])
    with pytest.raises(UserError, match=r"2 of 24 images in .*photos do not decode: ") as caught:
        decode_images(images, SMALL, tmp_path / "p.npy")
    assert all(file in str(caught.value) for file in images.files[3:5])


def test_the_only_image_unreadable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1 images"):
        decode_images(find_images(tmp_path, "evaluation"), SMALL, tmp_path / "p.npy")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_member_of_a_zip_is_skipped(method: int, tmp_path: Path) -> None:
    file = tmp_path / "damaged.zip"
    with zipfile.ZipFile(file, "w", method) as archive:
        for i in range(24):
            archive.writestr(f"a/{i:02}.bmp", b"BM" + b"some text that compresses well " * 20 if i == 7 else _bmp(i))
        start = archive.getinfo("a/07.bmp").header_offset + 30 + len("a/07.bmp")
        length = archive.getinfo("a/07.bmp").compress_size
    data = bytearray(file.read_bytes())
    data[start : start + length] = b"\xff" * length
    file.write_bytes(data)
    pixels = decode_images(find_images(file, "evaluation"), SMALL, tmp_path / "p.npy")
    assert pixels.skipped == ("a/07.bmp",)
    assert pixels.load().shape[0] == 23


def _bmp(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise(9, 9, seed).save(buffer, "BMP")
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif", "ppm"])
def test_damaged_files_never_crash_the_decoder(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    options = {"exif": exif} if suffix in ("jpg", "png", "webp", "tif") else {}
    noise(20, 16).save(tmp_path / f"whole.{suffix}", **options)
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    generator = np.random.default_rng(0)
    file = tmp_path / f"damaged.{suffix}"
    for trial in range(60):
        damaged = bytearray(whole[: generator.integers(len(whole))] if trial % 2 else whole)
        for _ in range(1 if trial % 2 else 4):
            if damaged:
                damaged[generator.integers(min(len(damaged), 120))] = generator.integers(256)
        file.write_bytes(damaged)
        try:
            assert read_image(file, SMALL).shape == (1, 3, 8, 8)
        except UserError as error:
            assert "does not decode" in str(error)  # noqa: PT017


def test_read_image_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image .*none\.png does not exist"):
        read_image(tmp_path / "none.png", SMALL)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"text\.png does not decode; supported: "):
        read_image(tmp_path / "text.png", SMALL)
