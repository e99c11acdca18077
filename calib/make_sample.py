"""Rebuilds the embedded sample from the original files; the result is the same to the byte.

    python calib/make_sample.py --fashion-mnist DIR [--checkpoint FILE] [--all OUT]

DIR holds the four files of Fashion-MNIST as published (*-ubyte.gz; Debian's package dataset-fashion-mnist has them).
FILE is the checkpoint in timm's key layout, with its .json of classes and preprocessing beside it.
OUT is a folder for train.zip and test.zip of all 70,000 images, for `gcvit-edge train`; the sample then stays as it is.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# archive: (split of the published files, first image of each class to take, images a class)
PARTS = {"calib": ("train", 0, 30), "train": ("train", 30, 100), "eval": ("t10k", 0, 200)}


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) uint8 and labels (N,) of a split."""
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def write_archive(path: Path, folder: Path, split: str, first: int, count: int | None) -> list[tuple[str, str, str, str]]:
    """A .zip of images `first` to `first + count` (None: all) of each class; gives the rows of the manifest."""
    images, labels = read_split(folder, split)
    stop = None if count is None else first + count
    rows = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for index, name in enumerate(CLASSES):
            for position in np.flatnonzero(labels == index)[first:stop]:
                buffer = io.BytesIO()
                Image.fromarray(images[position]).save(buffer, "PNG", optimize=True)
                file = f"{name.replace('/', '_')}/{split}-{position:05d}.png"
                archive.writestr(zipfile.ZipInfo(file), buffer.getvalue())
                rows.append((path.name, file, name, hashlib.sha256(buffer.getvalue()).hexdigest()))
    return rows


def write_images(folder: Path) -> None:
    """calib.zip, train.zip, eval.zip and manifest.csv."""
    rows = []
    for part, (split, first, count) in PARTS.items():
        rows += write_archive(HERE / f"{part}.zip", folder, split, first, count)
    with (HERE / "manifest.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("archive", "file", "class", "sha256"), *rows])


def write_all(folder: Path, out: Path) -> None:
    """train.zip and test.zip of every image."""
    out.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", "train"), ("test", "t10k")):
        write_archive(out / f"{name}.zip", folder, split, 0, None)


def write_checkpoint(source: Path) -> None:
    """The reference model in our layout, float16, with labels, preprocessing, origin and licence in its metadata."""
    from gcvit_edge.data import Labels, Preprocessing
    from gcvit_edge.model.checkpoint import save_checkpoint
    from gcvit_edge.model.create import load_model
    from gcvit_edge.model.info import Origin

    described = json.loads(source.with_suffix(".json").read_text())
    preprocessing = Preprocessing(size=(224, 224), resize=224)
    model, info = load_model(str(source), labels=Labels.of(described["classes"]), preprocessing=preprocessing)
    origin = Origin(
        source="gcvit-edge: trained from random weights on Tiny-ImageNet, last stage and head fine-tuned on Fashion-MNIST",
        layout="gcvit-edge",
        licence="Apache-2.0",
    )
    save_checkpoint(model, info.model_copy(update={"origin": origin}), HERE / source.name, half=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--all", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    if arguments.all:
        write_all(arguments.fashion_mnist, arguments.all)
    else:
        write_images(arguments.fashion_mnist)
    if arguments.checkpoint:
        write_checkpoint(arguments.checkpoint)
