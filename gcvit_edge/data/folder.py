"""Image files in class folders, or in a zip archive of them."""

import os
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.data.labels import Labels
from gcvit_edge.errors import UserError, nearest

# of what Pillow reads, JPEG by all its names
IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES))


@dataclass(frozen=True)
class ImageFolder:
    """Image files of a folder or a zip archive, laid out as `class folder/image`.

    root: the folder or the archive. files: names relative to it. classes: class folder of each file ("" for a file that
    lies directly in the root). empty: folders of the root that hold no image.
    """

    root: Path
    files: tuple[str, ...]
    classes: tuple[str, ...]
    empty: tuple[str, ...] = ()

    def select(self, count: int, seed: int) -> "ImageFolder":
        """`count` images, spread evenly over the classes; so are the first n of them, for any n.

        `seed` chooses the images, and which classes come first: with more classes than images not every class has one.
        """
        generator = np.random.default_rng(seed)
        members: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(self.classes):
            members[name].append(index)
        queues = [generator.permutation(members[name]).tolist() for name in sorted(members)]
        generator.shuffle(queues)
        ranked = (index for rank in zip_longest(*queues) for index in rank if index is not None)
        return self.take(islice(ranked, count))

    def some(self, eval_images: int, seed: int) -> "ImageFolder":
        """As many of its images as a user asks for, as `select` chooses them.

        Raises:
            UserError: that is none.
        """
        if eval_images < 1:
            raise UserError(f"eval_images must be at least 1, got {eval_images}; leave it out to take all of {self.root}")
        return self.select(eval_images, seed)

    def without(self, others: "ImageFolder") -> "ImageFolder":
        """Those of its images that are not among `others`, of the same root."""
        dropped = set(others.files)
        return self.take(index for index, file in enumerate(self.files) if file not in dropped)

    def listing(self) -> list[str]:
        """Name and bytes, unpacked, of each file (-1 of one that is gone): what tells its images from others without reading them."""
        if self.root.is_dir():
            return [f"{name} {_size(self.root / name)}" for name in self.files]
        with zipfile.ZipFile(self.root) as archive:
            return [f"{name} {archive.getinfo(name).file_size}" for name in self.files]

    def take(self, indices: Iterable[int]) -> "ImageFolder":
        """The images at these positions."""
        kept = list(indices)
        return ImageFolder(self.root, tuple(self.files[i] for i in kept), tuple(self.classes[i] for i in kept))


def find_images(root: Path, purpose: str) -> ImageFolder:
    """Lists the images of a folder, behind symbolic links too, or of a .zip; `purpose` is what error messages call them.

    Raises:
        UserError: `root` does not exist, is neither a folder nor a zip archive that Python reads, or holds no image, or one whose
            name is not UTF-8.
        OSError: a folder in it may not be read.
    """
    if not root.exists():
        raise UserError(f"{purpose} folder {root} does not exist; give a folder (or .zip) with one sub-folder of images a class")
    if root.is_dir():
        names = sorted(filter(_is_image, _names_below(root)))
        folders = {entry.name for entry in root.iterdir() if entry.is_dir()}
    elif zipfile.is_zipfile(root):
        listed = _names_in(root, purpose)
        names = sorted(filter(_is_image, listed))
        folders = {name.partition("/")[0] for name in listed if "/" in name}
    else:
        raise UserError(f"{purpose} images: {root} is neither a folder nor a zip archive")
    if not names:
        raise UserError(f"{purpose} folder {root} holds no image ({_SUFFIXES})")
    for name in filter(_undecoded, names):
        raise UserError(f"{purpose} images: the name {name!a} in {root} is not UTF-8; rename it")
    classes = tuple(Path(name).parts[0] if "/" in name else "" for name in names)
    empty = sorted(name for name in folders - set(classes) if not _left_behind(name))
    return ImageFolder(root, tuple(names), classes, tuple(empty))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # such as a link to nowhere, which does not decode either
        return -1


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.endswith("/") and not any(map(_left_behind, Path(name).parts))


def _undecoded(name: str) -> bool:
    """Whether it has bytes that are no UTF-8, as of an old archive: neither a report nor a terminal can hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def _left_behind(name: str) -> bool:
    """By programs, beside the user's own files: Jupyter's checkpoints, what macOS adds to a zip."""
    return name.startswith(".") or name == "__MACOSX"


def _names_below(root: Path) -> Iterator[str]:
    for path, folders, files in os.walk(root, followlinks=True, onerror=_raise):
        folder = Path(path)
        above = {os.path.realpath(each) for each in (folder, *folder.parents)}  # a link to one of them would be followed for ever
        folders[:] = [name for name in folders if not _left_behind(name) and os.path.realpath(folder / name) not in above]
        yield from ((folder / name).relative_to(root).as_posix() for name in files)


def _raise(error: OSError) -> NoReturn:
    raise error  # os.walk would leave the folder out


def _names_in(archive: Path, purpose: str) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
            for first in islice(filter(_is_image, names), 1):
                with suppress(zipfile.BadZipFile):  # one damaged image is no reason to refuse the others
                    opened.open(first).close()
    except (RuntimeError, zipfile.BadZipFile) as error:  # encrypted, or (NotImplementedError) compressed in another way; damaged
        raise UserError(
            f"{purpose} images: {archive} cannot be read ({error}); unpack it and give the folder, or make a plain .zip of it"
        ) from error
    return names


def check_apart(flag: str, images: Path, evaluation: Path, used: str) -> None:
    """Refuses to evaluate on the images of `flag`, which are used before: `used` says for what.

    Raises:
        UserError: they are the same, or the one folder lies in the other.
    """
    first, second = images.resolve(), evaluation.resolve()
    nested = first.is_dir() and second.is_dir() and (first.is_relative_to(second) or second.is_relative_to(first))
    if first == second or nested:
        shown = f"are both {images}" if first == second else f"share images, {images} and {evaluation}"
        raise UserError(f"{flag} and --eval {shown}; accuracy on images that were {used}, so give other images to one of them")


def check_empty(images: ImageFolder) -> None:
    """Refuses folders without an image where the folders are the classes.

    Raises:
        UserError: there are some; the message names them.
    """
    if images.empty:
        raise UserError(
            f"{images.root} has folders without an image ({_SUFFIXES}): {', '.join(images.empty[:5])}; the network "
            "would not have them as classes: remove them, or give them images"
        )


def has_all_classes(images: ImageFolder, labels: Labels) -> bool:
    """Whether its folders are those of all classes, by the folders of the labels or by their names."""
    found = {_normal(name) for name in images.classes}
    return found in (set(_positions(labels.folders)), set(_positions(Labels.of(labels.names).folders)))


def check_depth(images: ImageFolder, labels: Labels) -> None:
    """Refuses a folder, or an archive of one, whose class folders lie one folder deeper, as in a train.zip of the folder `train`.

    Raises:
        UserError: all images lie in one folder, which is no class, and there in folders that are.
    """
    first, *others = set(images.classes)
    if others:
        return
    below = {_normal(Path(name).parts[1]) for name in images.files if name.count("/") > 1}
    index = _class_index(labels)
    if _normal(first) in index or not below or not below <= set(index):
        return
    instead = images.root / first if images.root.is_dir() else f"a .zip of what is in {first}/"
    raise UserError(f"{images.root} has the class folders in a folder, {first}, which is no class; give {instead}")


def class_indices(images: ImageFolder, labels: Labels) -> NDArray[np.int64]:
    """Class index of every image, from its class folder: the folder of a label, else the name of one.

    Raises:
        UserError: images without a class folder, or a folder that is no class of the model, or more than one, or as `check_depth`.
    """
    if "" in images.classes:
        stray = images.files[images.classes.index("")]
        advice = "its names have \\ for /: unpack it, and zip it again" if "\\" in stray else "lay them out as class/image"
        raise UserError(f"{images.root} has images outside class folders, such as {stray}; {advice}")
    index = _class_index(labels)
    unknown = sorted(name for name in set(images.classes) if _normal(name) not in index)
    if unknown:
        check_depth(images, labels)
        guess = nearest(unknown[0], index)
        raise UserError(
            f"{images.root} has {len(unknown)} folders that are no class of the model: {', '.join(unknown[:5])}"
            + (f" (did you mean {guess!r}?)" if guess else "")
            + f". The model's {len(labels.names)} classes: {', '.join(labels.folders[:10])}"
            + (", ..." if len(labels.folders) > 10 else "")
            + ". Rename the folders; quantize and train also take other class names, with --labels"
        )
    for name in sorted(set(images.classes)):
        found = index[_normal(name)]
        if len(found) > 1:
            raise UserError(
                f"{images.root} has the folder {name!r}, but the model's classes {' and '.join(map(str, found))} have this name; "
                "give every class a folder of its own, and --labels with a line `folder<TAB>name` for each"
            )
    return np.array([index[_normal(name)][0] for name in images.classes], np.int64)


def _class_index(labels: Labels) -> dict[str, list[int]]:
    """Positions of the classes by what their folders may be called."""
    return _positions(Labels.of(labels.names).folders) | _positions(labels.folders)


def _normal(name: str) -> str:
    """One way of several to write the same letters: some file systems take names apart, `e` and its accent."""
    return unicodedata.normalize("NFC", name)


def _positions(names: Iterable[str]) -> dict[str, list[int]]:
    """Where each name is, counted from 0; some are there more than once."""
    found: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names):
        found[_normal(name)].append(position)
    return dict(found)
