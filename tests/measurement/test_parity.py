"""When golden logits count as reproduced."""

import numpy as np
import pytest

from gcvit_edge.errors import CheckFailed
from gcvit_edge.measurement.parity import MIN_SQNR_DB, Arithmetic, check_parity

GOLDEN = np.array([[4.0, 1.0, -2.0, 0.5], [-1.0, 0.2, 3.0, -0.7]], np.float32)


def test_equal() -> None:
    parity = check_parity(GOLDEN, GOLDEN, "float")
    assert (parity.sqnr_db, parity.same_top1, parity.passed, parity.equal) == (999, 1, True, True)
    assert parity.describe() == "exactly, top class the same"


@pytest.mark.parametrize(("scale", "precision", "passes"), [(1.01, "int8", True), (1.01, "float", False), (1.2, "int8", False)])
def test_floor_of_each_precision(scale: float, precision: str, passes: bool) -> None:
    assert check_parity(GOLDEN * np.float32(scale), GOLDEN, precision).passed is passes  # type: ignore[arg-type]


@pytest.mark.parametrize(("measured", "minimum"), [(None, 20), (22.0, 20), (40.0, 34), (999.0, 80)])
def test_int8_repeats_about_as_exactly_as_it_was_measured(measured: float | None, minimum: float) -> None:
    noisy = GOLDEN * np.float32(1 + 10 ** (-30 / 20))  # at 30 dB: what sums that saturate leave of 40 dB
    parity = check_parity(noisy, GOLDEN, "int8", measured_db=measured)
    assert (parity.minimum_db, parity.passed) == (minimum, minimum < 30)


@pytest.mark.parametrize(
    ("made_in", "measured", "computed_in", "minimum"),
    [
        ("int8", 40.0, "float", 28), ("int8", 40.0, "float16", 28), ("int8", 40.0, "bfloat16", 25), ("int8", 40.0, "int8", 20),
        ("int8", 23.0, "float", 11), ("fp16", 70.0, "float", 58), ("int4", 36.0, "tf32", 24), ("int8", None, "float", 20),
        *(("float", None, each, MIN_SQNR_DB[each]) for each in ("float", "tf32", "bfloat16", "fp8")),
    ],
)  # fmt: skip
def test_what_is_computed_otherwise(made_in: Arithmetic, measured: float | None, computed_in: Arithmetic, minimum: float) -> None:
    """Is as far from the golden logits as they were measured to be from float, or as its own rounding takes it."""
    assert check_parity(GOLDEN, GOLDEN, made_in, computed_in, measured_db=measured).minimum_db == minimum


def test_another_top_class_fails_though_the_noise_is_low() -> None:
    golden = np.zeros((1, 1000), np.float32)
    golden[0, :500] = 3.0
    golden[0, 0] = 6.0
    swapped = golden.copy()
    swapped[0, [0, 1]] = 3.0, 6.0
    parity = check_parity(swapped, golden, "int8")
    assert parity.sqnr_db > parity.minimum_db
    assert parity.same_top1 == 0
    assert not parity.passed


@pytest.mark.parametrize(("minimum", "measured"), [(20, None), (34, 40.0)])
@pytest.mark.parametrize(("lead", "passes"), [(1.9, True), (2.1, False)])
def test_twice_the_noise_that_is_let_through_may_change_the_top_class(
    minimum: float, measured: float | None, lead: float, passes: bool
) -> None:
    golden = np.tile(np.array([[-1.0, 1.0]], np.float32), (1, 50_000))
    golden[0, 0] = 1 + lead * 10 ** (-minimum / 20)  # in units of the RMS, which is 1
    swapped = golden.copy()
    swapped[0, [0, 1]] = golden[0, [1, 0]]
    parity = check_parity(swapped, golden, "int8", measured_db=measured)
    assert parity.sqnr_db > parity.minimum_db == minimum
    assert (parity.same_top1, parity.passed) == (0, passes)


def test_a_tie_may_fall_either_way() -> None:
    golden = np.array([[2.0, 1.999, -3.0]], np.float32)
    parity = check_parity(np.array([[1.999, 2.0, -3.0]], np.float32), golden, "int8")
    assert (parity.same_top1, parity.passed) == (0, True)
    assert parity.describe().endswith("top class the same in 0%")


def test_not_finite() -> None:
    parity = check_parity(np.full_like(GOLDEN, np.nan), GOLDEN, "int8")
    assert (parity.sqnr_db, parity.passed) == (-999, False)


def test_another_shape() -> None:
    message = r"gives \(2, 3\) logits, its golden output has \(2, 4\); get the bundle again, or, for PyTorch, give --weights the checkpoint"
    with pytest.raises(CheckFailed, match=message):
        check_parity(GOLDEN[:, :3], GOLDEN, "int8")
