"""Image files decoded: all of a folder into one array on disk, or one into the network's input."""

import io
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from gcvit_edge.data.folder import ImageFolder
from gcvit_edge.data.preprocessing import Preprocessing, check_shape, upright_rgb
from gcvit_edge.errors import UserError
from gcvit_edge.paths import require_file

MAX_UNREADABLE = 0.05  # fraction of images that may fail to decode before it is an error


@dataclass(frozen=True)
class Undecodable:
    """What is there of an image that does not decode. reason: the decoder's own words."""

    reason: str


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


def decode_images(
    images: ImageFolder,
    preprocessing: Preprocessing,
    file: Path,
    advance: Callable[[], object] = lambda: None,
    max_unreadable: float = MAX_UNREADABLE,
) -> Pixels:
    """Decodes, resizes and crops every image into the .npy `file`; calls `advance` after each. max_unreadable: the fraction of images that
    may fail to; of a few that are drawn from many, chance alone makes it more than it is of all.

    Raises:
        UserError: more than that (and more than one) do not decode, or none does; the message names some.
        OSError: the disk is full. Were the file mapped to write it, that would end the process.
    """
    kept: list[int] = []
    skipped: dict[str, Undecodable] = {}
    with ThreadPoolExecutor() as pool, file.open("wb") as out:
        _write_header(out, len(images.files), preprocessing)
        for position, pixels in enumerate(pool.map(decoder(images.root, preprocessing.pixels), images.files)):
            advance()
            if isinstance(pixels, Undecodable):
                skipped[images.files[position]] = pixels
            else:
                out.write(pixels.tobytes())
                kept.append(position)
        _check_skipped(images, skipped, max_unreadable)
        out.seek(0)
        _write_header(out, len(kept), preprocessing)
    return Pixels(file, np.array(kept, np.int64), tuple(skipped))


def _write_header(out: IO[bytes], count: int, preprocessing: Preprocessing) -> None:
    """Of an .npy; it has the same length for any count: NumPy leaves room for the first axis to grow."""
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": (count, *preprocessing.size, 3)})


def find_readable(images: ImageFolder, advance: Callable[[], object] = lambda: None) -> NDArray[np.int64]:
    """Positions of the images that decode; calls `advance` after each.

    Raises:
        UserError: more than 5 % (and more than one) of the images do not decode; the message names some.
    """

    def probe(image: Image.Image) -> NDArray[np.uint8]:
        check_shape(image)  # before its sides are rounded
        image.draft("RGB", (1, 1))  # for JPEG: all of the file is read, at an eighth of the resolution
        upright_rgb(image)
        return np.empty(0, np.uint8)

    kept: list[int] = []
    skipped: dict[str, Undecodable] = {}
    with ThreadPoolExecutor() as pool:
        for position, found in enumerate(pool.map(decoder(images.root, probe), images.files)):
            advance()
            if isinstance(found, Undecodable):
                skipped[images.files[position]] = found
            else:
                kept.append(position)
    _check_skipped(images, skipped, MAX_UNREADABLE)
    return np.array(kept, np.int64)


def _check_skipped(images: ImageFolder, skipped: dict[str, Undecodable], most: float) -> None:
    if len(skipped) > max(1, most * len(images.files)) or len(skipped) == len(images.files):
        named = [f"{name} ({undecodable.reason})" for name, undecodable in islice(skipped.items(), 5)]
        raise UserError(
            f"{len(skipped)} of {len(images.files)} images in {images.root} do not decode: {', '.join(named)}"
            + (", ..." if len(skipped) > 5 else "")
            + "; repair or remove them"
        )


def decoder(root: Path, convert: Callable[[Image.Image], NDArray[np.uint8]]) -> Callable[[str], NDArray[np.uint8] | Undecodable]:
    """A function from a name below `root`, a folder or a .zip, to what `convert` makes of the image."""
    archive = None if root.is_dir() else zipfile.ZipFile(root)  # reads from several threads are safe

    def decode(name: str) -> NDArray[np.uint8] | Undecodable:
        try:
            # opened here: a file that Pillow opens itself it may map into memory, and then TIFFs that EXIF turns have their sides swapped
            with (root / name).open("rb") if archive is None else io.BytesIO(archive.read(name)) as file, Image.open(file) as image:
                return convert(image)
        except MemoryError:
            raise
        except UnidentifiedImageError:  # whose message is of the file object
            return Undecodable("cannot identify image file")
        except Exception as error:  # a damaged file raises whatever its decoder stumbles over; one of thousands must not end the run
            return Undecodable(str(error) or type(error).__name__)

    return decode


def read_image(path: Path, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """One image file as the network's input, (1, 3, H, W) float32.

    Raises:
        UserError: the file is missing or does not decode.
    """
    require_file(path, "image")
    pixels = decoder(path.parent, preprocessing.pixels)(path.name)
    if isinstance(pixels, Undecodable):
        raise UserError(f"image {path} does not decode: {pixels.reason}; give a file that Pillow reads, such as .jpg, .png or .webp")
    return preprocessing.normalize(pixels)


def inputs(pixels: Pixels, preprocessing: Preprocessing, count: int | None = None) -> Iterator[NDArray[np.float32]]:
    """Network inputs (1, 3, H, W) float32 of the first `count` images (None: all), one at a time."""
    for image in pixels.load()[:count]:
        yield preprocessing.normalize(image)
