"""Accuracy of an artifact's logits against labels and against float logits of the same images. NumPy only."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.errors import CheckFailed

Logits = NDArray[np.float32]
Classes = NDArray[np.int64]

EQUAL_DB = 999.0  # stands for infinity, which JSON does not have
_SIGMAS = 3  # of guessing, above which a model is taken to know something
_Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


def hits(logits: Logits, labels: Classes, k: int) -> NDArray[np.bool_]:
    """Whether each image's label is among its `k` highest logits; of equal ones the first is the higher, as argmax has it. Logits that are
    not all finite are no answer, and no hit. logits (N, classes), labels (N,)."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    higher = (logits > own) | ((logits == own) & earlier)
    return (higher.sum(axis=1) < k) & np.isfinite(logits).all(axis=1)


def agreement(logits: Logits, reference: Logits) -> float:
    """Fraction of images with the same top-1 class."""
    return float(_same_top1(logits, reference).mean())


def _same_top1(logits: Logits, reference: Logits) -> NDArray[np.bool_]:
    """Of each image; logits that are not all finite have no top-1 class."""
    return hits(logits, reference.argmax(1), 1) & np.isfinite(reference).all(axis=1)


def sqnr_db(logits: Logits, reference: Logits) -> float:
    """Signal to quantization noise ratio of the logits in dB: 10 log10(sum ref^2 / sum (ref - logits)^2).

    Infinite for equal logits, minus infinity for logits that are not finite.
    """
    noise = float(np.square(reference.astype(np.float64) - logits).sum())
    signal = float(np.square(reference.astype(np.float64)).sum())
    if not (math.isfinite(noise) and math.isfinite(signal)):
        return -math.inf
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def sqnr_interval(logits: Logits, reference: Logits) -> tuple[float, float]:
    """95 % confidence interval in dB of `sqnr_db` on images like these; (N, classes) both, an image being one observation.

    SQNR is the ratio of two sums over images. The variance of its logarithm is that of the images' shares of signal less their shares
    of noise (Cochran, Sampling Techniques, 1977, section 6.4: linearization of a ratio). A single image tells nothing: the interval is
    infinite, as it is where logits are not finite; where they are equal, both ends are infinity.
    """
    level = sqnr_db(logits, reference)
    if level == math.inf:
        return level, level
    count = len(reference)
    signal = np.square(reference.astype(np.float64)).sum(1)
    noise = np.square(reference.astype(np.float64) - logits).sum(1)
    if count < 2 or not math.isfinite(level) or not signal.any():
        return -math.inf, math.inf
    shares = signal / signal.mean() - noise / noise.mean()
    spread = _Z95 * 10 / math.log(10) * math.sqrt(float(shares.var(ddof=1)) / count)
    return level - spread, level + spread


def finite_db(level: float) -> float:
    """An SQNR as JSON can hold it: 999 for infinity, -999 for minus infinity."""
    return float(np.clip(level, -EQUAL_DB, EQUAL_DB))


def paired_drop(reference: NDArray[np.bool_], changed: NDArray[np.bool_]) -> tuple[float, tuple[float, float]]:
    """Drop of a hit rate on the same images, with its 95 % confidence interval, in percentage points.

    The interval is Agresti and Min's for matched pairs (Statistics in Medicine 24, 2005): Wald's after adding half an image
    to each cell, so that it keeps its coverage, and a width, when few or no images change.
    """
    count = len(reference)
    lost, won = int((reference & ~changed).sum()), int((~reference & changed).sum())
    centre = (lost - won) / (count + 2)
    spread = _Z95 * math.sqrt((lost + won + 1) - (lost - won) ** 2 / (count + 2)) / (count + 2)
    return 100 * (lost - won) / count, (100 * (centre - spread), 100 * (centre + spread))


def images_that_show(drop: float) -> int:
    """The fewest images on which `paired_drop` can end its interval at `drop` points (over 0): if no answer changes."""
    return math.ceil(100 * _Z95 / drop) - 2


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a rate (Wilson, 1927), as fractions."""
    z2 = _Z95**2
    rate = right / count
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    spread = math.sqrt(z2 * (rate * (1 - rate) + z2 / (4 * count)) / count) / (1 + z2 / count)
    return max(0.0, centre - spread), min(1.0, centre + spread)  # which of all or none right are past these by rounding


@dataclass(frozen=True)
class Accuracy:
    """top1, top5, agreement: fractions. drop_points, drop_ci95, worst_class_drop_points: percentage points, positive is worse.
    sqnr_db: as `finite_db` has it. *_ci95: 95 % intervals, in the same units."""

    top1: float
    top5: float
    drop_points: float
    drop_ci95: tuple[float, float]
    agreement: float
    agreement_ci95: tuple[float, float]
    sqnr_db: float
    sqnr_ci95: tuple[float, float]
    worst_class_drop_points: float
    worst_class: int


def compare(logits: Logits, reference: Logits, labels: Classes) -> Accuracy:
    """Accuracy of `logits` against the float `reference`, both (N, classes), on images of classes `labels` (N,)."""
    before, after = hits(reference, labels, 1), hits(logits, labels, 1)
    drop, interval = paired_drop(before, after)
    classes = np.unique(labels)
    drops = [100 * float(before[labels == c].mean() - after[labels == c].mean()) for c in classes]
    worst = int(np.argmax(drops))
    same = _same_top1(logits, reference)
    low, high = sqnr_interval(logits, reference)
    return Accuracy(
        top1=float(after.mean()),
        top5=float(hits(logits, labels, 5).mean()),
        drop_points=drop,
        drop_ci95=interval,
        agreement=float(same.mean()),
        agreement_ci95=wilson_interval(int(same.sum()), len(same)),
        sqnr_db=finite_db(sqnr_db(logits, reference)),
        sqnr_ci95=(finite_db(low), finite_db(high)),
        worst_class_drop_points=drops[worst],
        worst_class=int(classes[worst]),
    )


def images_to_judge(classes: int) -> int:
    """The fewest images on which a model that is always right passes `check_baseline`."""
    return 1 if classes < 2 else math.floor(_SIGMAS**2 / (classes - 1)) + 1


def check_finite(logits: Logits) -> None:
    """Refuses a float model whose activations overflow.

    Raises:
        CheckFailed: some of its logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise CheckFailed("the float model gives logits that are not finite; the checkpoint or the preprocessing is broken")


def check_baseline(logits: Logits, labels: Classes) -> None:
    """Refuses a float baseline that is no better than chance: a drop measured against it would mean nothing.

    Raises:
        CheckFailed: top-1 is within three standard deviations of guessing, or the logits are not finite.
    """
    check_finite(logits)
    chance, count = 1 / logits.shape[1], len(labels)
    top1 = float(hits(logits, labels, 1).mean())
    if logits.shape[1] > 1 and top1 <= chance + _SIGMAS * math.sqrt(chance * (1 - chance) / count):
        raise CheckFailed(
            f"the float model's top-1 is {top1:.1%} on {count} images, no better than guessing ({chance:.1%}); check that the labels "
            "are in the order of the logits and that the preprocessing is the model's"
        )
