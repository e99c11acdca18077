"""Images and labels: one definition of the preprocessing for calibration, evaluation, bundles and apps. No torch."""

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict

from gcvit_edge.errors import UserError, nearest

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
MAX_UNREADABLE = 0.05  # fraction of images that may fail to decode before it is an error

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Preprocessing(BaseModel):
    """From an image file to the network's input.

    In this order: EXIF orientation, RGB, resize with antialiasing as Pillow does it (the shorter side to `resize` pixels, the
    longer one rounded; or, for mode "squash", straight to `size`), centre crop to `size` (height, width) with the offset
    rounded down, division by 255, normalisation by channel. torchvision truncates the longer side and rounds the offset: its
    crop lies up to a pixel elsewhere, which moves logits of photographs by some tenths, but no accuracy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[int, int] = (224, 224)
    resize: int = 256
    mode: Literal["shortest_edge", "squash"] = "shortest_edge"
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD

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
        scaled = pixels.astype(np.float32) / np.float32(255)
        scaled = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])

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
    """The image as its EXIF orientation wants it shown, in RGB."""
    return ImageOps.exif_transpose(image).convert("RGB")


def default_preprocessing(size: tuple[int, int], crop_pct: float, squash: bool = False) -> Preprocessing:
    """ImageNet's normalisation; the crop is `crop_pct` of the resized image, as timm and NVlabs define it."""
    return Preprocessing(size=size, resize=int(min(size) / crop_pct), mode="squash" if squash else "shortest_edge")


def read_preprocessing(path: Path) -> Preprocessing:
    """Reads a Hugging Face `preprocessor_config.json`.

    Raises:
        UserError: not readable, not JSON, or it asks for something that this preprocessing cannot do.
    """
    data = _read_json(path, "a preprocessor_config.json")
    try:
        crop = data.get("crop_size") or data["size"]
        size = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
        resize = data["size"] if isinstance(data["size"], dict) else {"shortest_edge": data["size"]}
        names = {int(value): name for name, value in RESAMPLING.items()}
        return Preprocessing(
            size=size,
            resize=resize.get("shortest_edge", min(size)),
            mode="shortest_edge" if "shortest_edge" in resize else "squash",
            interpolation=names[data.get("resample", 3)],  # type: ignore[arg-type]
            mean=data["image_mean"],
            std=data["image_std"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a preprocessor_config.json that can be used: {error!r} is missing or wrong") from error


class Labels(BaseModel):
    """Class names in the order of the logits, and the folder name of each class (the name itself, or a WordNet id)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...]
    folders: tuple[str, ...]

    @staticmethod
    def of(names: Iterable[str]) -> "Labels":
        """Labels whose folders are their names, with what a file system cannot have replaced by `_`."""
        names = tuple(names)
        return Labels(names=names, folders=tuple(name.replace("/", "_") for name in names))


def read_labels(path: Path) -> Labels:
    """Reads class names: a text file with a class a line (`name`, or `folder<TAB>name`), or JSON.

    JSON may be a list of names, a list of `{"wnid": folder, "name": name}`, Hugging Face's `{"id2label": {"0": name}}`, or
    an object with such a list under "classes".

    Raises:
        UserError: the file is missing, empty or of another form.
    """
    if path.suffix == ".json":
        data: Any = _read_json(path, "labels")
        data = data.get("classes") or data.get("id2label") or data if isinstance(data, dict) else data
        if isinstance(data, dict):  # id2label
            data = [data[key] for key in sorted(data, key=int)] if all(key.isdigit() for key in data) else []
        entries = data if isinstance(data, list) else []
        pairs: list[Any] = [(e["wnid"], e["name"]) if isinstance(e, dict) and {"wnid", "name"} <= set(e) else (e, e) for e in entries]
        if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
            raise UserError(f"{path} holds no list of class names; give a list of strings, or a text file with a name a line")
    else:
        lines = [line.rstrip("\r") for line in _read_text(path, "labels").split("\n") if line.strip()]
        if not lines:
            raise UserError(f"labels file {path} is empty; write one class name a line, in the order of the logits")
        pairs = [(line.split("\t")[0], line.split("\t")[-1]) for line in lines]
    return Labels(names=tuple(n for _, n in pairs), folders=tuple(f.replace("/", "_") for f, _ in pairs))


def _read_text(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as {what}: {error}") from error


def _read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(_read_text(path, what))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


@dataclass(frozen=True)
class ImageFolder:
    """Image files of a folder or a zip archive, laid out as `class folder/image`.

    root: the folder or the archive. files: names relative to it. classes: class folder of each file ("" for a file that
    lies directly in the root).
    """

    root: Path
    files: tuple[str, ...]
    classes: tuple[str, ...]

    def select(self, count: int, seed: int) -> "ImageFolder":
        """`count` images, spread evenly over the classes and chosen by `seed`, in a fixed order."""
        generator = np.random.default_rng(seed)
        queues = {name: [i for i, c in enumerate(self.classes) if c == name] for name in sorted(set(self.classes))}
        for queue in queues.values():
            generator.shuffle(queue)
        ranked = sorted((rank, name, i) for name, queue in queues.items() for rank, i in enumerate(queue))
        chosen = sorted(i for _, _, i in ranked[:count])
        return ImageFolder(self.root, tuple(self.files[i] for i in chosen), tuple(self.classes[i] for i in chosen))

    def without(self, others: "ImageFolder") -> "ImageFolder":
        """Those of its images that are not among `others`, of the same root."""
        kept = [i for i, file in enumerate(self.files) if file not in set(others.files)]
        return ImageFolder(self.root, tuple(self.files[i] for i in kept), tuple(self.classes[i] for i in kept))


def find_images(root: Path, purpose: str) -> ImageFolder:
    """Lists the images of a folder or a .zip; `purpose` is what error messages call them.

    Raises:
        UserError: `root` does not exist, is neither a folder nor a zip archive, or holds no image.
    """
    if not root.exists():
        raise UserError(f"{purpose} folder {root} does not exist; give a folder (or .zip) with one sub-folder of images a class")
    if root.is_dir():
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    elif zipfile.is_zipfile(root):
        with zipfile.ZipFile(root) as archive:
            names = sorted(name for name in archive.namelist() if not name.endswith("/"))
    else:
        raise UserError(f"{purpose} images: {root} is neither a folder nor a zip archive")
    names = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise UserError(f"{purpose} folder {root} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return ImageFolder(root, tuple(names), tuple(Path(name).parts[0] if "/" in name else "" for name in names))


def class_indices(images: ImageFolder, labels: Labels) -> NDArray[np.int64]:
    """Class index of every image, from its class folder: the folder or the name of a label.

    Raises:
        UserError: images without a class folder, or a folder that is no class of the model.
    """
    if "" in images.classes:
        stray = images.files[images.classes.index("")]
        raise UserError(f"{images.root} has images outside class folders, such as {stray}; lay them out as class/image")
    index = {name.replace("/", "_"): i for i, name in enumerate(labels.names)}
    index |= {folder: i for i, folder in enumerate(labels.folders)}
    unknown = sorted(set(images.classes) - set(index))
    if unknown:
        guess = nearest(unknown[0], index)
        raise UserError(
            f"{images.root} has {len(unknown)} folders that are no class of the model: {', '.join(unknown[:5])}"
            + (f" (did you mean {guess!r}?)" if guess else "")
            + f". The model's {len(labels.names)} classes: {', '.join(labels.folders[:10])}"
            + (", ..." if len(labels.folders) > 10 else "")
            + ". Rename the folders, or give the class names with --labels"
        )
    return np.array([index[name] for name in images.classes], np.int64)


@dataclass(frozen=True)
class Pixels:
    """Resized and cropped images on disk, shared by all processes that run them.

    file: .npy of (N, H, W, 3) uint8. kept: positions in the ImageFolder of the images that decoded. skipped: the names of
    those that did not.
    """

    file: Path
    kept: NDArray[np.int64]
    skipped: tuple[str, ...]

    def load(self) -> NDArray[np.uint8]:
        """The pixels, mapped into memory."""
        return np.load(self.file, mmap_mode="r")


def decode_images(images: ImageFolder, preprocessing: Preprocessing, file: Path, advance: Callable[[], object] = lambda: None) -> Pixels:
    """Decodes, resizes and crops every image into the .npy `file`; calls `advance` after each.

    Raises:
        UserError: more than 5 % (and more than one) of the images do not decode; the message names some.
    """
    height, width = preprocessing.size
    out = np.lib.format.open_memmap(file, "w+", np.uint8, (len(images.files), height, width, 3))
    kept, skipped = [], []
    with ThreadPoolExecutor() as pool:
        for position, pixels in enumerate(pool.map(decoder(images.root, preprocessing.pixels), images.files)):
            advance()
            if pixels is None:
                skipped.append(images.files[position])
            else:
                out[len(kept)] = pixels
                kept.append(position)
    _check_skipped(images, skipped)
    out.flush()
    if skipped:
        np.save(file, np.array(out[: len(kept)]))
    return Pixels(file, np.array(kept, np.int64), tuple(skipped))


def find_readable(images: ImageFolder, advance: Callable[[], object] = lambda: None) -> NDArray[np.int64]:
    """Positions of the images that decode; calls `advance` after each.

    Raises:
        UserError: more than 5 % (and more than one) of the images do not decode; the message names some.
    """

    def probe(image: Image.Image) -> NDArray[np.uint8]:
        image.draft("RGB", (1, 1))  # for JPEG: all of the file is read, at an eighth of the resolution
        image.load()
        return np.empty(0, np.uint8)

    kept, skipped = [], []
    with ThreadPoolExecutor() as pool:
        for position, found in enumerate(pool.map(decoder(images.root, probe), images.files)):
            advance()
            (skipped if found is None else kept).append(position)
    _check_skipped(images, [images.files[position] for position in skipped])
    return np.array(kept, np.int64)


def _check_skipped(images: ImageFolder, skipped: list[str]) -> None:
    if len(skipped) > max(1, MAX_UNREADABLE * len(images.files)) or len(skipped) == len(images.files):
        raise UserError(
            f"{len(skipped)} of {len(images.files)} images in {images.root} do not decode: {', '.join(skipped[:5])}"
            + (", ..." if len(skipped) > 5 else "")
            + "; repair or remove them"
        )


def decoder(root: Path, convert: Callable[[Image.Image], NDArray[np.uint8]]) -> Callable[[str], NDArray[np.uint8] | None]:
    """A function from a name below `root`, a folder or a .zip, to what `convert` makes of the image; None if it does not decode."""
    archive = None if root.is_dir() else zipfile.ZipFile(root)  # reads from several threads are safe

    def decode(name: str) -> NDArray[np.uint8] | None:
        try:
            with Image.open(root / name if archive is None else io.BytesIO(archive.read(name))) as image:
                return convert(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, zipfile.BadZipFile, zlib.error):
            return None

    return decode


def read_image(path: Path, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """One image file as the network's input, (1, 3, H, W) float32.

    Raises:
        UserError: the file is missing or does not decode.
    """
    if not path.is_file():
        raise UserError(f"image {path} does not exist")
    pixels = decoder(path.parent, preprocessing.pixels)(path.name)
    if pixels is None:
        raise UserError(f"image {path} does not decode; supported: {', '.join(sorted(IMAGE_SUFFIXES))}")
    return preprocessing.normalize(pixels)


def inputs(pixels: Pixels, preprocessing: Preprocessing, count: int | None = None) -> Iterator[NDArray[np.float32]]:
    """Network inputs (1, 3, H, W) float32 of the first `count` images (None: all), one at a time."""
    for image in pixels.load()[:count]:
        yield preprocessing.normalize(image)
