"""From an image file to the network's input: one definition for calibration, evaluation, bundles and apps."""

import json
import math
import struct
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PpmImagePlugin, TiffImagePlugin
from pydantic import Field, PositiveFloat, PositiveInt

from gcvit_edge.errors import UserError
from gcvit_edge.schema import Section, read_json, validate

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_INTERPOLATION = {int(value): name for name, value in RESAMPLING.items()}
_ALWAYS = ("do_resize", "do_rescale", "do_normalize")
_KNOWN = ("do_center_crop", "do_convert_rgb")
_OF_CHANNELS = Field(min_length=3, max_length=3)
_LONGEST = 100  # times the shorter side: of a strip 20,000 pixels long and one wide, the resize would be of gigabytes
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class Preprocessing(Section):
    """From an image file to the network's input.

    In this order: EXIF orientation, RGB, resize with antialiasing as Pillow does it (the shorter side to `resize` pixels, the
    longer one rounded; or, for mode "squash", straight to `size`), centre crop to `size` (height, width) with the offset
    rounded down, division by 255, normalisation by channel. torchvision truncates the longer side and rounds the offset: its
    crop lies up to a pixel elsewhere, which moves logits of photographs by some tenths, but no accuracy.
    """

    size: tuple[PositiveInt, PositiveInt] = (224, 224)
    resize: PositiveInt = 256
    mode: Literal["shortest_edge", "squash"] = "shortest_edge"
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    mean: Annotated[tuple[float, ...], _OF_CHANNELS] = _IMAGENET_MEAN
    std: Annotated[tuple[PositiveFloat, ...], _OF_CHANNELS] = _IMAGENET_STD

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resized and cropped pixels, (H, W, 3) uint8."""
        image = upright_rgb(image)
        height, width = self.size
        filter_ = RESAMPLING[self.interpolation]
        if self.mode == "squash":
            return np.asarray(image.resize((width, height), filter_))
        short, long = sorted(image.size)
        long = round(self.resize * long / short)
        resized = (self.resize, long) if image.width <= image.height else (long, self.resize)
        if image.size != resized:
            image = image.resize(resized, filter_)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return np.asarray(image.crop((left, top, left + width, top + height)))

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(H, W, 3) uint8 pixels to the network's input, (1, 3, H, W) float32."""
        out = np.empty((1, 3, *pixels.shape[:2]), np.float32)
        for channel, plane in enumerate(out[0]):  # by plane and in place: 0.1 ms instead of 1.2 at 224 px, the same bits
            np.divide(pixels[..., channel], np.float32(255), out=plane)
            plane -= np.float32(self.mean[channel])
            plane /= np.float32(self.std[channel])
        return out

    def to_huggingface(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`."""
        height, width = self.size
        squash = self.mode == "squash"
        return {
            "image_processor_type": "ViTImageProcessor" if squash else "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": height, "width": width} if squash else {"shortest_edge": self.resize},
            "resample": int(RESAMPLING[self.interpolation]),
            "do_center_crop": not squash,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation wants it shown, in RGB; of 16 bits of grey the upper 8, as Pillow has it of 16 bits of colour.

    Raises:
        ValueError: pixels of 32 bits, for which nothing says what is white; or as `check_shape`.
    """
    check_shape(image)
    image.load()
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "I" and isinstance(image, PpmImagePlugin.PpmImageFile):  # of more than 8 bits, which Pillow makes 16
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "La":  # whose colours are multiplied by alpha, as those of RGBa, which Pillow converts itself
        image = image.convert("LA")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, expected 8 or 16 bits")
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255
        bits, inverted = _grey_of_tiff(image)
        pixels = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        image = Image.fromarray(255 - pixels if inverted else pixels)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """What EXIF says; 1, upright, of a block that Pillow cannot read, whose pixels are as good as any.

    Pillow's own `exif_transpose` also writes all of the block anew, and fails where one of its tags is of an odd type.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, OSError, struct.error):
        return 1


def _grey_of_tiff(image: Image.Image) -> tuple[int, bool]:
    """Bits of a pixel of up to 16 (12 are usual in microscopes), and whether 0 is white. Pillow hands on both as they are in the file."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 16, False
    tags = image.tag_v2
    (bits, *_), kind = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,)), tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1)
    return bits, kind == 0


def check_shape(image: Image.Image) -> None:
    """Refuses lines, such as spacers of web pages.

    Raises:
        ValueError: one side is over 100 times as long as the other.
    """
    short, long = sorted(image.size)
    if long > _LONGEST * short:
        raise ValueError(f"{image.width}x{image.height} pixels, expected at most {_LONGEST} times as many on one side as on the other")


def default_preprocessing(size: tuple[int, int], crop_pct: float, squash: bool = False) -> Preprocessing:
    """ImageNet's normalisation; the crop is `crop_pct` of the resized image, as timm and NVlabs define it, in its longer side."""
    return Preprocessing(size=size, resize=int(max(size) / crop_pct), mode="squash" if squash else "shortest_edge")


def read_preprocessing(path: Path) -> Preprocessing:
    """Reads a Hugging Face `preprocessor_config.json`.

    Raises:
        UserError: not readable, not JSON, or it asks for something that this preprocessing cannot do.
    """
    data = read_json(path, "preprocessor_config.json")
    try:
        resize, crop = _sizes(data)
        beyond = _beyond(data, resize, crop)
        fields = {} if beyond else _from_huggingface(data, resize, crop)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a preprocessor_config.json that can be used: {error} is missing or wrong") from error
    if beyond:
        raise UserError(
            f"{path} asks for {', '.join(beyond)}, which this preprocessing cannot do; it resizes the shorter side and crops the centre, "
            "or resizes straight to the input, then divides by 255 and normalises; give a file that asks for that"
        )
    return validate(Preprocessing, fields, str(path))


def _from_huggingface(data: dict[str, Any], resize: dict[str, Any], crop: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Preprocessing`."""
    squash = "shortest_edge" not in resize
    size = resize if squash else crop
    return {
        "size": (size["height"], size["width"]),
        "resize": min(size.values()) if squash else resize["shortest_edge"],
        "mode": "squash" if squash else "shortest_edge",
        "interpolation": _INTERPOLATION[data["resample"]],
        "mean": data["image_mean"],
        "std": data["image_std"],
    }


def _sizes(data: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """`size` and `crop_size` as mappings, the second empty where nothing is cropped; in old files they may be plain numbers."""
    crops = data.get("do_center_crop", data.get("crop_size") is not None)
    size, crop = data["size"], data["crop_size"] if crops else {}
    if not isinstance(size, dict):  # as transformers read it: the shorter side where there is a crop, else a square
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    if not isinstance(crop, dict):
        crop = {"height": crop, "width": crop}
    return tuple({key: each[key] for key in each if each[key] is not None} for each in (size, crop))


def _beyond(data: dict[str, Any], resize: dict[str, Any], crop: dict[str, Any]) -> list[str]:
    """What a preprocessor_config.json asks for that `Preprocessing` cannot do, in its words."""
    found = {key: data[key] for key in _ALWAYS if not data.get(key, True)}
    # padding, channels in another order, ...; crop_pct: how much larger than the crop some processors resize
    found |= {key: data[key] for key in data if data[key] and key not in (*_ALWAYS, *_KNOWN) and key.startswith(("do_", "crop_pct"))}
    if not math.isclose(data.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-5):  # float32 rounds it
        found["rescale_factor"] = data["rescale_factor"]
    if data["resample"] not in _INTERPOLATION:  # where it is absent, processors differ in what they take
        found["resample"] = data["resample"]
    right = bool(crop) if set(resize) == {"shortest_edge"} else set(resize) == {"height", "width"} and crop in ({}, resize)
    if not right:
        found |= {key: data[key] for key in ("size", "do_center_crop", "crop_size") if key in data}
    return [f"{key} {json.dumps(value)}" for key, value in found.items()]
