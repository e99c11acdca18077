"""Decoding: every image, or a message that names those that do not decode."""

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from images import noise, save_all, zipped
from PIL import Image, ImageOps

from gcvit_edge.data import Preprocessing, decode_images, find_images, find_readable, inputs, read_image
from gcvit_edge.errors import UserError

EXIF_ORIENTATION = 0x0112
SMALL = Preprocessing(size=(8, 8), resize=8)


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


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_zip_and_folder_give_equal_pixels_of_turned_tiffs(orientation: int, mode: str, tmp_path: Path) -> None:
    """Of two colours, left and right as they are in the file; Pillow maps files without compression into memory, if it may."""
    upright = Image.new("L", (20, 16))
    upright.paste(255, (10, 0, 20, 16))
    image = Image.fromarray(np.asarray(upright).astype(np.uint16) * 257) if mode == "I;16" else upright.convert("RGB").convert(mode)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    (tmp_path / "photos").mkdir()
    image.save(tmp_path / "photos" / "turned.tif", exif=exif)
    folder = decode_images(find_images(tmp_path / "photos", "evaluation"), SMALL, tmp_path / "a.npy")
    archive = decode_images(find_images(zipped(tmp_path / "photos", tmp_path / "photos.zip"), "evaluation"), SMALL, tmp_path / "b.npy")
    np.testing.assert_array_equal(folder.load(), archive.load())
    top, bottom = folder.load()[0, 0], folder.load()[0, 7]  # the right one is at the bottom after a transposition or a turn to the right
    black, white = (top, bottom) if orientation in (5, 6) else (bottom, top)
    assert black.max() < 20
    assert white.min() > 235


def test_an_unreadable_image_is_skipped_and_named(photos: Path, tmp_path: Path) -> None:
    images = find_images(photos, "evaluation")
    (photos / images.files[5]).write_bytes(b"not an image")
    pixels = decode_images(images, SMALL, tmp_path / "p.npy")
    assert pixels.skipped == (images.files[5],)
    assert pixels.kept.tolist() == [i for i in range(24) if i != 5]
    assert pixels.load().shape == (23, 8, 8, 3)
    np.testing.assert_array_equal(pixels.load()[5], SMALL.pixels(Image.open(photos / images.files[6])))
    np.testing.assert_array_equal(pixels.load()[22], SMALL.pixels(Image.open(photos / images.files[23])))


def test_pixels_are_not_mapped_while_they_are_written(photos: Path, tmp_path: Path) -> None:
    maps: list[str] = []  # with a full disk, to write to one ends the process
    file = tmp_path / "p.npy"
    decode_images(find_images(photos, "evaluation"), SMALL, file, lambda: maps.append(Path("/proc/self/maps").read_text()))
    assert len(maps) == 24
    assert not any(str(file) in each for each in maps)


def test_a_skipped_image_does_not_bring_the_others_into_memory(photos: Path, tmp_path: Path) -> None:
    images, large = find_images(photos, "evaluation"), Preprocessing(size=(128, 128), resize=128)
    (photos / images.files[5]).write_bytes(b"not an image")
    ticks = iter(images.files)

    def advance() -> None:
        if next(ticks) == images.files[-1]:  # all others are written
            tracemalloc.start()

    pixels = decode_images(images, large, tmp_path / "p.npy", advance)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pixels.load().nbytes == 23 * 128 * 128 * 3
    assert peak < pixels.load().nbytes / 4


def test_too_many_unreadable_images_are_an_error(photos: Path, tmp_path: Path) -> None:
    images = find_images(photos, "evaluation")
    for file in images.files[3:5]:
        (photos / file).write_bytes((photos / file).read_bytes()[:40])
    with pytest.raises(UserError, match=r"2 of 24 images in .*photos do not decode: ") as caught:
        decode_images(images, SMALL, tmp_path / "p.npy")
    assert all(file in str(caught.value) for file in images.files[3:5])
    assert len(decode_images(images, SMALL, tmp_path / "p.npy", max_unreadable=1).kept) == 22


def test_the_only_image_unreadable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1 images"):
        decode_images(find_images(tmp_path, "evaluation"), SMALL, tmp_path / "p.npy")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_member_of_a_zip_is_skipped(method: int, tmp_path: Path) -> None:
    file = tmp_path / "damaged.zip"
    with zipfile.ZipFile(file, "w", method) as archive:
        for i in range(24):
            archive.writestr(f"a/{i:02}.bmp", b"BM" + b"some text that compresses well " * 20 if i == 7 else _bmp(i))
        start = archive.getinfo("a/07.bmp").header_offset + 30 + len("a/07.bmp")
        length = archive.getinfo("a/07.bmp").compress_size
    data = bytearray(file.read_bytes())
    data[start + length // 2 : start + length] = b"\xff" * (length - length // 2)
    file.write_bytes(data)
    pixels = decode_images(find_images(file, "evaluation"), SMALL, tmp_path / "p.npy")
    assert pixels.skipped == ("a/07.bmp",)
    assert pixels.load().shape[0] == 23


@pytest.mark.parametrize(("flag", "method"), [(1, 0), (0, 9)])
def test_single_members_that_python_cannot_read_are_skipped(flag: int, method: int, photos: Path, tmp_path: Path) -> None:
    file = zipped(photos, tmp_path / "photos.zip", zipfile.ZIP_STORED)
    images = find_images(file, "evaluation")
    with zipfile.ZipFile(file) as archive:
        local = archive.getinfo(images.files[7]).header_offset
    data = bytearray(file.read_bytes())
    central = data.rindex(images.files[7].encode()) - 46  # the name follows the header
    for at in (local + 6, central + 8):
        data[at], data[at + 2] = flag, method
    file.write_bytes(data)
    assert decode_images(find_images(file, "evaluation"), SMALL, tmp_path / "p.npy").skipped == (images.files[7],)


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
    with pytest.raises(UserError, match=r"image .* is a folder; give a file"):
        read_image(tmp_path, SMALL)
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"text\.png does not decode: cannot identify image file; give a file that Pillow reads"):
        read_image(tmp_path / "text.png", SMALL)
    Image.fromarray(np.ones((30, 40), np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(UserError, match=r"depth\.tif does not decode: pixels of mode F, expected 8 or 16 bits; give"):
        read_image(tmp_path / "depth.tif", SMALL)


@pytest.mark.parametrize(("tag", "value"), [(0x011A, "seventy-two"), (0x0103, "jpeg"), (0x0102, "eight")])
def test_turned_images_with_odd_tags_decode(tag: int, value: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    noise(20, 16).save(tmp_path / "plain.jpg", exif=exif)
    noise(20, 16).save(tmp_path / "odd.jpg", exif=_turned_with_text(tag, value))
    with Image.open(tmp_path / "odd.jpg") as image, pytest.raises((TypeError, struct.error)):
        ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(read_image(tmp_path / "odd.jpg", SMALL), read_image(tmp_path / "plain.jpg", SMALL))


def _turned_with_text(tag: int, value: str) -> bytes:
    """An EXIF block of orientation 6 whose `tag`, of numbers by the standard, is of text."""
    text = value.encode() + b"\0"
    entries = [(tag, 2, len(text), 38), (EXIF_ORIENTATION, 3, 1, 6)]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + packed + struct.pack("<I", 0) + text


def test_what_trains_is_what_decodes(photos: Path, tmp_path: Path) -> None:
    images = find_images(photos, "training")
    Image.fromarray(np.ones((30, 40), np.float32)).save(photos / images.files[5], "TIFF")
    expected = [position for position in range(24) if position != 5]
    assert find_readable(images).tolist() == expected
    assert decode_images(images, SMALL, tmp_path / "p.npy").kept.tolist() == expected


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (101, 1)])
def test_lines_do_not_decode(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size).save(tmp_path / "line.png")
    with pytest.raises(UserError, match=f"line.png does not decode: {size[0]}x{size[1]} pixels, expected at most 100 times as many"):
        read_image(tmp_path / "line.png", Preprocessing())
