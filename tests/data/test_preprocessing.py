"""Preprocessing by the documented rule, and preprocessor_config.json."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from images import noise
from PIL import Image
from torchvision import transforms

from gcvit_edge.data import Preprocessing, default_preprocessing, read_preprocessing
from gcvit_edge.data.preprocessing import upright_rgb
from gcvit_edge.errors import UserError

TORCHVISION = {
    "nearest": transforms.InterpolationMode.NEAREST,
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
}
EXIF_ORIENTATION = 0x0112


def specified_pixels(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The documented rule (longer side rounded, crop offset rounded down), by torchvision's resize and crop."""
    short, long = sorted(image.size)
    long = round(preprocessing.resize * long / short)
    shape = (long, preprocessing.resize) if image.height > image.width else (preprocessing.resize, long)
    resized = transforms.functional.resize(image, list(shape), TORCHVISION[preprocessing.interpolation])
    height, width = preprocessing.size
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    return np.asarray(transforms.functional.crop(resized, top, left, height, width))


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


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (224, 224)])
def test_the_default_crop_lies_within_the_image(size: tuple[int, int]) -> None:
    pixels = default_preprocessing(size, 0.875).pixels(Image.new("RGB", (50, 50), "white"))
    assert pixels.shape == (*size, 3)
    assert pixels.min() == 255  # without the black that is around an image


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey(suffix: str) -> None:
    grey = np.random.default_rng(0).integers(0, 2**16, (30, 40), np.uint16)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, suffix)
    file.seek(0)
    expected = Preprocessing().pixels(Image.fromarray((grey >> 8).astype(np.uint8)))
    np.testing.assert_array_equal(Preprocessing().pixels(Image.open(file)), expected)


@pytest.mark.parametrize(("bits", "photometric"), [(16, 1), (16, 0), (12, 1)])
def test_grey_of_microscopes_and_x_rays(bits: int, photometric: int) -> None:
    """TIFF of 12 bits, and of 16 where 0 is white (no other is read): written by hand, since Pillow does not."""
    grey = np.random.default_rng(0).integers(0, 2**bits, (30, 40), np.uint16)
    if bits == 16:
        data = grey.astype("<u2").tobytes()
    else:  # two pixels in three bytes
        first, second = grey.reshape(-1, 2).T.astype(int)
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    tags = {256: 40, 257: 30, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 30, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file = io.BytesIO(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    eight = (grey >> (bits - 8)).astype(np.uint8)
    expected = Preprocessing().pixels(Image.fromarray(255 - eight if photometric == 0 else eight))
    np.testing.assert_array_equal(Preprocessing().pixels(Image.open(file)), expected)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG"])
def test_an_exif_block_that_is_none(suffix: str) -> None:
    file = io.BytesIO()
    noise(40, 30).save(file, suffix, exif=b"Exif\0\0garbage!", dpi=(72, 72))
    plain = io.BytesIO()
    noise(40, 30).save(plain, suffix)
    np.testing.assert_array_equal(Preprocessing().pixels(Image.open(file)), Preprocessing().pixels(Image.open(plain)))


@pytest.mark.parametrize("most", [255, 1023, 4095, 65535])
def test_portable_grey_of_any_depth(most: int) -> None:
    """As X-ray and microscope programs write it."""
    levels = np.linspace(0, 1, 40 * 30).reshape(30, 40)
    bits = (levels * most).astype(">u2" if most > 255 else "u1")
    image = Image.open(io.BytesIO(b"P5 40 30 %d\n" % most + bits.tobytes()))
    grey = np.asarray(upright_rgb(image))[:, :, 0].astype(int)
    assert np.abs(grey - levels * 255).max() <= 1.5


def test_grey_that_is_multiplied_by_alpha() -> None:
    image = Image.new("LA", (40, 30), (200, 128)).convert("La")
    assert abs(int(np.asarray(upright_rgb(image))[0, 0, 0]) - 200) <= 2


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_no_known_white_are_refused(dtype: type) -> None:
    with pytest.raises(ValueError, match="expected 8 or 16 bits"):
        Preprocessing().pixels(Image.fromarray(np.ones((30, 40), dtype)))


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
    usual = default_preprocessing((224, 224), 0.875)
    assert (usual.mode, usual.interpolation) == ("shortest_edge", "bicubic")
    assert (usual.mean, usual.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
    file.write_text(json.dumps({"size": 224, "resample": 2, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))  # ViTFeatureExtractor's
    assert read_preprocessing(file) == expected.model_copy(update={"mode": "squash", "resize": 224})


@pytest.mark.parametrize(
    "changes",
    [
        {"rescale_factor": 0.003921568859368563},  # 1 / 255 in float32
        {"do_convert_rgb": None, "do_pad": None, "pad_size": None, "data_format": "channels_first", "return_tensors": None},  # fast ones
        {"size": {"height": 224, "width": 224}, "do_center_crop": True},  # a crop that takes nothing away
        {"size": {"height": 224, "width": 224}, "do_center_crop": None, "crop_size": None},
        {"crop_size": {"height": 224, "width": 224, "shortest_edge": None}, "do_center_crop": True},
        {"size": {"height": 224, "width": 224}, "do_center_crop": False, "crop_size": {"height": 192, "width": 192}},
    ],
)
def test_what_transformers_write_is_read(changes: dict, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    expected = Preprocessing(resize=224 if "size" in changes else 256, mode="squash" if "size" in changes else "shortest_edge")
    file.write_text(json.dumps(Preprocessing().to_huggingface() | changes))
    assert read_preprocessing(file) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale_factor": 1 / 127.5}, r"asks for rescale_factor 0\.0078\d*, which this preprocessing cannot do; it resizes"),
        ({"rescale_factor": 1 / 256}, "asks for rescale_factor"),
        ({"do_rescale": False, "do_normalize": None}, "asks for do_rescale false, do_normalize null, which"),
        ({"do_resize": False}, "asks for do_resize false"),
        ({"do_flip_channel_order": True}, "asks for do_flip_channel_order true"),
        ({"crop_pct": 0.9}, r"asks for crop_pct 0\.9"),
        ({"resample": 1}, "asks for resample 1"),
        ({"size": {"height": 256, "width": 256}}, r'asks for size \{"height": 256, "width": 256\}, do_center_crop true, crop_size'),
        ({"do_center_crop": False}, r'asks for size \{"shortest_edge": 256\}, do_center_crop false'),
        ({"size": {"shortest_edge": 256, "longest_edge": 400}}, 'asks for size .*"longest_edge"'),
        ({"size": {"shortest_edge": 0}}, "resize: got 0; Input should be greater than 0"),
        ({"crop_size": {"height": 224, "width": -1}}, r"size\.1: got -1"),
        ({"image_mean": [0.5]}, "mean: got .*0.5.*at least 3 items"),
        ({"image_std": [0.5, 0.5, 0.5, 0.5]}, "std: got .*at most 3 items"),
        ({"image_std": [0.2, 0, 0.2]}, r"std\.1: got 0; Input should be greater than 0"),
        ({"image_mean": [0.2, float("nan"), 0.2]}, r"mean\.1: got nan; Input should be a finite number"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(Preprocessing().to_huggingface() | changes))
    with pytest.raises(UserError, match=message):
        read_preprocessing(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "can be used: 'size' is missing or wrong"),
        ('{"size": {"shortest_edge": 8}, "crop_size": 8, "resample": 99, "image_mean": [0], "image_std": [1]}', "99"),
        ('{"size": 8, "crop_size": 8, "resample": 3, "image_mean": "x", "image_std": [1]}', "mean"),
        ('{"size": 8, "crop_size": 8, "image_mean": [0], "image_std": [1]}', "'resample'.* is missing"),
        ("[1, 2]", "preprocessor_config.json"),
        ('"text"', "preprocessor_config.json"),
        ('{"size": {"shortest_edge": 8}, "do_center_crop": true, "image_mean": [0], "image_std": [1]}', "crop_size.* is missing"),
        ('{"size": 8, "crop_size": 8, "resample": [3], "image_mean": [0], "image_std": [1]}', "missing or wrong"),
        ('{"size": 8, "crop_size": 8, "rescale_factor": null, "image_mean": [0], "image_std": [1]}', "missing or wrong"),
    ],
)
def test_unusable_preprocessing_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_preprocessing(file)


def test_missing_preprocessing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"preprocessor_config\.json file .*nothing\.json does not exist"):
        read_preprocessing(tmp_path / "nothing.json")
