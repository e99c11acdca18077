"""Training images: the deployed preprocessing without augmentation, and randomness that depends on (seed, epoch, image) alone."""

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gcvit_edge.data import ImageFolder, Preprocessing, find_images, read_image
from gcvit_edge.errors import UserError
from gcvit_edge.training.images import LabelledImages, Samples, augmenter, derived_seed, epoch_order, loader
from gcvit_edge.training.settings import Augmentation

HEAVY = Augmentation(color_jitter=0.4, rand_augment=9)


def test_without_augmentation_the_network_sees_what_the_artifacts_see(colours: LabelledImages) -> None:
    samples = Samples(colours)
    for index in (0, 17, 39):
        image, label = samples[index]
        expected = read_image(colours.images.root / colours.images.files[index], colours.preprocessing)
        np.testing.assert_array_equal(image.numpy(), expected[0])
        assert label == index // 10
    assert len(samples) == 40


def test_augmentation_depends_on_seed_epoch_and_image_alone(colours: LabelledImages) -> None:
    first, again = Samples(colours, HEAVY, seed=1, epoch=2), Samples(colours, HEAVY, seed=1, epoch=2)
    expected = [first[index][0] for index in range(6)]
    torch.manual_seed(99)
    for index in reversed(range(6)):
        assert torch.equal(again[index][0], expected[index])
    for other in (Samples(colours, HEAVY, seed=2, epoch=2), Samples(colours, HEAVY, seed=1, epoch=3)):
        assert not any(torch.equal(other[index][0], expected[index]) for index in range(6))
    same_image = LabelledImages(replace(colours.images, files=(colours.images.files[0],) * 40), colours.classes, colours.preprocessing)
    samples = Samples(same_image, Augmentation(), seed=1, epoch=2)
    assert not torch.equal(samples[0][0], samples[1][0])


@pytest.mark.parametrize("zipped", [False, True])
def test_processes_that_read_ahead_give_the_same(colours: LabelledImages, zipped: bool, tmp_path: Path) -> None:
    if zipped:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
            for file in colours.images.files:
                archive.write(colours.images.root / file, file)
        colours = LabelledImages(find_images(tmp_path / "images.zip", "training"), colours.classes, colours.preprocessing)
    batches = [[5, 0, 33], [7, 38, 1], [2, 2]]
    here, elsewhere = (list(loader(Samples(colours, HEAVY, seed=4), batches, torch.device("cpu"), workers)) for workers in (0, 2))
    assert [classes.tolist() for _, classes in here] == [[0, 0, 3], [0, 3, 0], [0, 0]]
    for a, b in zip(here, elsewhere, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_flip_mirrors_and_a_whole_crop_keeps_the_image() -> None:
    preprocessing = Preprocessing(size=(32, 32), mode="squash")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8))
    whole = augmenter(preprocessing, Augmentation(crop_scale=(1, 1), flip=0))(image)
    np.testing.assert_array_equal(whole, preprocessing.pixels(image))
    np.testing.assert_array_equal(augmenter(preprocessing, Augmentation(crop_scale=(1, 1), flip=1))(image), whole[:, ::-1])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P"])
def test_images_of_any_mode_and_shape(mode: str) -> None:
    pixels = augmenter(Preprocessing(size=(32, 64)), HEAVY)(Image.new(mode, (300, 20)))
    assert (pixels.shape, pixels.dtype) == ((32, 64, 3), np.uint8)


def test_every_epoch_has_all_images_in_another_order() -> None:
    orders = [epoch_order(100, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert epoch_order(100, 0, 1).tolist() == orders[1]


def test_derived_seeds_differ() -> None:
    seeds = {derived_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_image_that_vanished(colours: LabelledImages, tmp_path: Path) -> None:
    gone = LabelledImages(ImageFolder(tmp_path, ("a/1.png",), ("a",)), np.zeros(1, np.int64), colours.preprocessing)
    with pytest.raises(UserError, match=r"image a/1\.png of .* does not decode any more"):
        _ = Samples(gone)[0]
    for workers in (0, 1):
        with pytest.raises(UserError) as caught:
            list(loader(Samples(gone), [[0]], torch.device("cpu"), workers))
        assert str(caught.value).startswith("image a/1.png of ")
        assert "Traceback" not in str(caught.value)


def test_samples_can_be_sent_to_a_process_that_reads_ahead(colours: LabelledImages) -> None:
    samples = Samples(colours, HEAVY)  # by pickling, where processes are not forked
    again = pickle.loads(pickle.dumps(samples))
    assert torch.equal(again[3][0], samples[3][0])


def test_the_identity_tells_other_images_classes_and_preprocessing_apart(colours: LabelledImages) -> None:
    others = [
        replace(colours, classes=colours.classes[::-1].copy()),
        replace(colours, images=replace(colours.images, files=colours.images.files[1:])),
        replace(colours, preprocessing=Preprocessing(size=(32, 32))),
    ]
    assert all(other.identity() != colours.identity() for other in others)
    assert colours.identity() == replace(colours).identity()
