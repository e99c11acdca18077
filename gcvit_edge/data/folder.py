"""Image files in class folders, or in a zip archive of them."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.data.labels import Labels
from gcvit_edge.errors import UserError, nearest

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


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
