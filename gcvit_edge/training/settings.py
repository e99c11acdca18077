"""What a training run does, as a section of a YAML file. No torch."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gcvit_edge.errors import UserError
from gcvit_edge.schema import Section, parse_yaml, read_text, validate

Fraction = Annotated[float, Field(ge=0, le=1)]


class Augmentation(Section):
    """Random changes of a training image, drawn anew for every image and epoch."""

    crop_scale: tuple[Fraction, Fraction] = Field((0.35, 1.0), description="area of the random crop, fraction of the image's")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    color_jitter: Fraction = Field(0.0, description="change of brightness, contrast and saturation, at most")
    rand_augment: int = Field(0, ge=0, le=30, strict=True, description="magnitude of RandAugment, two operations an image; 0 is off")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError("crop_scale is [smallest, largest], above 0")
        return self


class Distillation(Section):
    """Learning from a teacher's logits (Hinton et al., arXiv:1503.02531): KL divergence at a temperature, times its square."""

    temperature: float = Field(1.0, gt=0)
    weight: Fraction = Field(1.0, description="of the divergence; the cross-entropy with the labels has the rest")


class TrainSettings(Section):
    """A training run: AdamW, linear warm-up and cosine, EMA of the weights. Two runs of the same settings give the same weights on
    the same CPU; on a GPU, but for the order of sums."""

    epochs: int = Field(10, ge=1, strict=True)
    batch_size: int = Field(32, ge=1, strict=True, description="images of one optimizer step, over all processes")
    micro_batch: int | None = Field(
        None, ge=1, strict=True, description="images of one forward pass; gradients of several add up (None: batch_size / processes)"
    )
    learning_rate: float = Field(2e-4, gt=0, description="peak, for all steps of batch_size images")
    weight_decay: float = Field(0.05, ge=0, description="of matrices and kernels; norms, biases and position biases have none")
    warmup: Fraction = Field(0.05, description="fraction of all steps in which the learning rate rises from 0")
    clip_norm: float | None = Field(1.0, gt=0, description="norm that all gradients together are cut to")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="of the average of the weights, which is the result; 0: the last weights")
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        "float32", description="of the products in the forward pass; auto: bfloat16 where the device has instructions; weights are float32"
    )
    seed: int = Field(0, ge=0, lt=2**63, strict=True)
    augmentation: Augmentation | None = Augmentation()  # type: ignore[call-arg]
    distillation: Distillation | None = None


class QatSettings(TrainSettings):
    """Quantization-aware fine-tuning: a short training run at a low learning rate, from a network that is quantized well already."""

    epochs: int = Field(2, ge=1, strict=True)
    learning_rate: float = Field(5e-5, gt=0, description="peak, for weights")
    range_learning_rate: float = Field(1e-3, gt=0, description="peak, for the logarithms of the ranges' ends")
    weight_decay: float = Field(0.0, ge=0, description="as above")
    ema_decay: float = Field(0.98, ge=0, lt=1, description="as above, of ranges too")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    distillation: Distillation | None = Field(Distillation(weight=0.5), description="from the float model")  # type: ignore[call-arg]
    images: int | None = Field(None, ge=1, strict=True, description="training images, spread evenly over the classes (None: all)")


def read_settings(path: Path | None, changes: dict[str, Any]) -> TrainSettings:
    """Settings of a YAML file (None: the defaults), with `changes` over them.

    Raises:
        UserError: the file cannot be read, an unknown key, or a value of the wrong kind.
    """
    settings = TrainSettings() if path is None else parse_yaml(TrainSettings, read_text(path, "settings"), f"settings {path}")  # type: ignore[call-arg]
    return validate(TrainSettings, settings.model_dump() | changes, "training configuration")


def micro_batches(settings: TrainSettings, processes: int) -> tuple[int, int]:
    """(images of a forward pass, forward passes of one process in an optimizer step).

    Raises:
        UserError: the batch cannot be shared out evenly.
    """
    size = settings.micro_batch or max(1, settings.batch_size // processes)
    if settings.batch_size % (size * processes):
        raise UserError(
            f"batch_size {settings.batch_size} is no multiple of {size * processes}: forward passes of {size} images in each of "
            f"{processes} processes; change batch_size or micro_batch"
        )
    return size, settings.batch_size // (size * processes)


def steps_per_epoch(images: int, settings: TrainSettings) -> int:
    """Optimizer steps of an epoch: an incomplete last batch is left out, and every epoch has another order.

    Raises:
        UserError: there is not one whole batch.
    """
    if images < settings.batch_size:
        raise UserError(f"{images} training images do not make one batch of {settings.batch_size}; give more, or a smaller --batch-size")
    return images // settings.batch_size
