"""Training images: which ones in which order, augmented how. All of it follows from (seed, epoch, image), so that neither the
number of processes nor an interruption changes what the network sees."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from gcvit_edge.cache import digest
from gcvit_edge.data import ImageFolder, Preprocessing, Undecodable, decoder, find_readable, upright_rgb
from gcvit_edge.errors import UserError
from gcvit_edge.progress import Steps
from gcvit_edge.training.settings import Augmentation

if TYPE_CHECKING:
    from accelerate import Accelerator

Convert = Callable[[Image.Image], NDArray[np.uint8]]
_ORDER = 0  # beside the numbers of images in a seed: that of an epoch's order


@dataclass(frozen=True)
class LabelledImages:
    """Images with the class index of each, and the preprocessing that makes network inputs of them. classes: (N,) int64."""

    images: ImageFolder
    classes: NDArray[np.int64]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.classes)

    def identity(self) -> dict[str, Any]:
        """What tells these images from others, wherever they lie: a hash of all names, sizes and classes, and the preprocessing."""
        images = digest([*self.images.listing(), self.classes])
        return {"images": images, "preprocessing": self.preprocessing.model_dump(mode="json")}


class Samples(Dataset[tuple[Tensor, int]]):
    """Network inputs (3, H, W) float32 and class indices. Without augmentation they are what the artifacts get.

    Raises, on access:
        UserError: the image does not decode.
    """

    def __init__(self, data: LabelledImages, augmentation: Augmentation | None = None, seed: int = 0, epoch: int = 0) -> None:
        self.data, self.seed, self.epoch = data, seed, epoch
        self._convert = data.preprocessing.pixels if augmentation is None else augmenter(data.preprocessing, augmentation)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        torch.default_generator.manual_seed(derived_seed(self.seed, self.epoch, index + 1))
        pixels = self._decode(self.data.images.files[index])
        if isinstance(pixels, Undecodable):
            name = self.data.images.files[index]
            raise UserError(f"image {name} of {self.data.images.root} does not decode any more: {pixels.reason}")
        return torch.from_numpy(self.data.preprocessing.normalize(pixels)[0]), int(self.data.classes[index])

    @cached_property
    def _decode(self) -> Callable[[str], NDArray[np.uint8] | Undecodable]:
        return decoder(self.data.images.root, self._convert)  # opened by the process that reads: archives cannot be shared


def augmenter(preprocessing: Preprocessing, augmentation: Augmentation) -> Convert:
    """Image to augmented pixels (H, W, 3) uint8 of the preprocessing's size; draws from PyTorch's default generator."""
    interpolation = v2.InterpolationMode(preprocessing.interpolation)
    height, width = preprocessing.size
    ratio = (3 / 4 * width / height, 4 / 3 * width / height)  # around that of the input
    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(preprocessing.size, scale=augmentation.crop_scale, ratio=ratio, interpolation=interpolation),
        v2.RandomHorizontalFlip(augmentation.flip),
    ]
    if augmentation.rand_augment:
        steps.append(v2.RandAugment(2, augmentation.rand_augment))
    if strength := augmentation.color_jitter:
        steps.append(v2.ColorJitter(strength, strength, strength))
    return partial(_augmented, transform=v2.Compose(steps))


def _augmented(image: Image.Image, *, transform: v2.Compose) -> NDArray[np.uint8]:
    return np.asarray(transform(upright_rgb(image)))


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of `count` images in an epoch, a permutation."""
    return np.random.default_rng((seed, epoch, _ORDER)).permutation(count)


def derived_seed(*numbers: int) -> int:
    """A seed that depends on all of `numbers`, and shows no likeness between those of neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def loader(samples: Samples, batches: Sequence[Sequence[int]], device: torch.device, workers: int) -> Iterator[list[Tensor]]:
    """Batches of images (B, 3, H, W) float32 and classes (B,) int64, read ahead by `workers` processes (0: by this one).

    Raises:
        UserError: an image does not decode.
    """
    try:
        yield from DataLoader(samples, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda")  # type: ignore[arg-type]
    except UserError as error:  # before the message of a process that reads ahead PyTorch puts its traceback
        raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from None


def readable(data: LabelledImages, name: str, accelerator: "Accelerator", steps: Steps) -> tuple[LabelledImages, list[str]]:
    """The images that decode, and the names of the others; looked at by the main process alone.

    Raises:
        UserError: more than 5 % of them do not decode.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    if accelerator.is_main_process:
        with steps.step(name, len(data)) as advance:
            found = [find_readable(data.images, advance)]
    kept = broadcast_object_list(found)[0]
    images = data.images.take(kept)
    return LabelledImages(images, data.classes[kept], data.preprocessing), list(data.images.without(images).files)
