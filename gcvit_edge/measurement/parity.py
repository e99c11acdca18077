"""Does an artifact give the answers here that it gave when it was made? One definition for `verify` and every target."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from gcvit_edge.artifact import Computed
from gcvit_edge.errors import CheckFailed
from gcvit_edge.measurement.accuracy import EQUAL_DB, finite_db, sqnr_db

# Float artifacts reproduce their golden logits on any machine. In INT8 the order of sums decides here and there which integer is
# nearest, so two instruction sets differ by about as much as either differs from float (some 40 dB); a wrong kernel is below 5 dB,
# one that saturates in between. The short floats were measured on the sample network on a CPU, TF32 by rounding the factors of every
# product: 63, 61 and 39 dB; linears in FP8 give 30. What has short weights alone is computed in float.
Arithmetic = Literal["tf32", "float16", "bfloat16"] | Computed
MIN_SQNR_DB: dict[Arithmetic, float] = {
    "float": 80.0, "fp16": 80.0, "bf16": 80.0, "int4": 80.0, "tf32": 45.0, "float16": 40.0, "bfloat16": 25.0, "fp8": 20.0,
    "int8": 20.0, "w4a8": 20.0,
}  # fmt: skip
MARGIN_DB = 6.0  # by which INT8 may be farther from itself on another machine than it was measured to be from float
OTHERS_MARGIN_DB = 12.0  # by which float may be, of the few golden images, where it was measured on many: single ones scatter by 6 dB


class Parity(BaseModel):
    """How golden logits were reproduced. sqnr_db: SQNR against them, 999 when equal, -999 when not finite. minimum_db: the floor
    of the arithmetic. same_top1: fraction of the golden images with the same top class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sqnr_db: float
    minimum_db: float
    same_top1: float
    passed: bool

    @property
    def equal(self) -> bool:
        """Equal to the last bit."""
        return self.sqnr_db == EQUAL_DB

    def describe(self) -> str:
        """For people: `to 36.2 dB (at least 20), top class the same`."""
        level = "exactly" if self.equal else f"to {self.sqnr_db:.1f} dB (at least {self.minimum_db:.0f})"
        return level + (", top class the same" if self.same_top1 == 1 else f", top class the same in {self.same_top1:.0%}")


def check_parity(
    logits: NDArray[np.float32],
    golden: NDArray[np.float32],
    made_in: Arithmetic,
    computed_in: Arithmetic | None = None,
    measured_db: float | None = None,
) -> Parity:
    """Compares logits (N, classes) with the golden ones. made_in: what the golden ones were computed in. computed_in: what these were,
    where it is not the same artifact in the same arithmetic. measured_db: SQNR against float that the golden ones' artifact was measured
    to have; without it gross errors alone are found.

    They pass if the SQNR reaches the floor of the arithmetic, and the measured one less `MARGIN_DB`; of another arithmetic than the golden
    ones', its floor, or the measured one less `OTHERS_MARGIN_DB` if that is lower. And the top class must be the same wherever the golden
    one leads by more than the noise that this lets through, twice its RMS.

    Raises:
        CheckFailed: the logits have another shape.
    """
    if logits.shape != golden.shape:
        raise CheckFailed(
            f"the artifact gives {logits.shape} logits, its golden output has {golden.shape}; get the bundle again, or, for PyTorch, give "
            "--weights the checkpoint that the bundle was made of"
        )
    minimum = MIN_SQNR_DB[made_in]
    if computed_in is not None:
        minimum = min(MIN_SQNR_DB[computed_in], minimum if measured_db is None else measured_db - OTHERS_MARGIN_DB)
    elif measured_db is not None:
        minimum = max(minimum, min(measured_db - MARGIN_DB, MIN_SQNR_DB["float"]))
    level = finite_db(sqnr_db(logits, golden))
    same = logits.argmax(1) == golden.argmax(1)
    noise = np.sqrt(np.square(golden, dtype=np.float64).mean()) * 10 ** (-minimum / 20)
    lead = golden.max(1) - np.take_along_axis(golden, logits.argmax(1)[:, None], 1)[:, 0]
    passed = level >= minimum and bool((lead <= 2 * noise).all())
    return Parity(sqnr_db=level, minimum_db=minimum, same_top1=float(same.mean()), passed=passed)
