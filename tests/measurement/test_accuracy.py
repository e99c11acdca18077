"""Accuracy figures against values worked out by hand, and the coverage of the interval by simulation."""

import math

import numpy as np
import pytest

from gcvit_edge.errors import CheckFailed
from gcvit_edge.measurement.accuracy import (
    agreement,
    check_baseline,
    compare,
    hits,
    images_that_show,
    images_to_judge,
    paired_drop,
    sqnr_db,
    sqnr_interval,
    wilson_interval,
)

LOGITS = np.array([[3, 2, 1, 0], [0, 1, 2, 3], [1, 3, 0, 2]], np.float32)


def outcomes(both: int, lost: int, won: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits before and after of matched pairs with these cells."""
    before = np.repeat([True, True, False, False], [both, lost, won, neither])
    after = np.repeat([True, False, True, False], [both, lost, won, neither])
    return before, after


def one_hot(classes: list[int], count: int) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


@pytest.mark.parametrize(
    ("labels", "k", "expected"),
    [
        ([0, 3, 1], 1, [True, True, True]),
        ([1, 3, 0], 1, [False, True, False]),
        ([1, 2, 3], 2, [True, True, True]),
        ([2, 0, 0], 2, [False, False, False]),
        ([2, 1, 2], 3, [True, True, False]),
        ([3, 0, 2], 5, [True, True, True]),  # fewer classes than k
    ],
)
def test_hits(labels: list[int], k: int, expected: list[bool]) -> None:
    assert hits(LOGITS, np.array(labels), k).tolist() == expected


def test_top_1_hits_are_argmax_and_grow_with_k() -> None:
    generator = np.random.default_rng(0)
    logits, labels = generator.standard_normal((200, 10), np.float32), generator.integers(0, 10, 200)
    np.testing.assert_array_equal(hits(logits, labels, 1), logits.argmax(1) == labels)
    order = np.argsort(-logits, 1)
    np.testing.assert_array_equal(hits(logits, labels, 5), (order[:, :5] == labels[:, None]).any(1))
    assert (hits(logits, labels, 5) >= hits(logits, labels, 1)).all()


def test_of_equal_logits_the_first_is_the_higher() -> None:
    """As argmax has it, with which agreement counts; few values in many classes, as of a network in INT8."""
    generator = np.random.default_rng(0)
    logits, labels = generator.integers(0, 3, (200, 40)).astype(np.float32), generator.integers(0, 40, 200)
    np.testing.assert_array_equal(hits(logits, logits.argmax(1), 1), np.ones(200, bool))
    order = np.argsort(-logits, 1, kind="stable")
    for k in (1, 2, 5, 39):
        np.testing.assert_array_equal(hits(logits, labels, k), (order[:, :k] == labels[:, None]).any(1))
    assert agreement(logits, logits) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_no_answer(value: float) -> None:
    broken = LOGITS.copy()
    broken[0, 1] = value
    for label in range(4):
        for k in (1, 4, 5):
            assert hits(broken, np.array([label, 3, 1]), k).tolist() == [False, True, True]
    assert agreement(broken, broken) == agreement(broken, LOGITS) == agreement(LOGITS, broken) == pytest.approx(2 / 3)
    assert compare(broken, LOGITS, np.array([0, 3, 1])).agreement == pytest.approx(2 / 3)


def test_agreement() -> None:
    other = LOGITS.copy()
    other[2] = [9, 0, 0, 0]
    assert agreement(LOGITS, LOGITS) == 1.0
    assert agreement(other, LOGITS) == pytest.approx(2 / 3)


def test_sqnr_by_hand() -> None:
    reference = np.array([[3, 4], [0, 0]], np.float32)  # signal 25
    logits = np.array([[3, 4.5], [0, 0]], np.float32)  # noise 0.25
    assert sqnr_db(logits, reference) == pytest.approx(20.0)
    assert sqnr_db(np.zeros_like(reference), reference) == pytest.approx(0.0)
    assert sqnr_db(-reference, reference) == pytest.approx(10 * math.log10(25 / 100))
    assert sqnr_db(reference, reference) == math.inf


def test_sqnr_of_a_silent_reference_is_very_low() -> None:
    assert sqnr_db(np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32)) < -1000


def test_sqnr_of_broken_logits_meets_no_minimum() -> None:
    broken = LOGITS.copy()
    broken[0, 0] = np.nan
    below = sqnr_db(broken, LOGITS) < 20.0
    assert below, "logits that are not numbers must be below every minimum"


def test_sqnr_interval_by_hand() -> None:
    # signal 1 and 9 of two images, noise 0.1 and 0.1: shares 0.2 - 1 and 1.8 - 1, variance 1.28, standard error 0.8 in logarithms
    reference = np.array([[1.0], [3.0]], np.float32)
    low, high = sqnr_interval(reference + np.float32(math.sqrt(0.1)), reference)
    level, spread = 10 * math.log10(10 / 0.2), 1.959964 * 0.8 * 10 / math.log(10)
    assert (low, high) == pytest.approx((level - spread, level + spread), abs=1e-4)


def test_sqnr_interval_where_noise_is_a_share_of_every_image_has_no_width() -> None:
    reference = np.random.default_rng(0).standard_normal((50, 10))
    low, high = sqnr_interval(1.01 * reference, reference)
    assert low == pytest.approx(40.0)
    assert high == pytest.approx(40.0)


def test_sqnr_interval_covers_the_true_level_95_times_in_100() -> None:
    generator, covered, count = np.random.default_rng(3), 0, 400
    # some images are much noisier than others, and louder ones more: squares are 4 exp(0.5) of signal and 0.01 exp(1) of noise on average
    for _ in range(1000):
        loud = generator.normal(0, 0.5, (count, 1))
        reference = 2 * np.exp(loud) * generator.standard_normal((count, 20))
        noise = 0.1 * np.exp(loud + generator.normal(0, 0.5, (count, 1))) * generator.standard_normal((count, 20))
        low, high = sqnr_interval(reference + noise, reference)
        covered += low <= 10 * math.log10(4 / (0.01 * math.exp(0.5))) <= high
    assert 0.92 <= covered / 1000 <= 0.97


def test_sqnr_interval_where_there_is_none() -> None:
    assert sqnr_interval(LOGITS, LOGITS) == (math.inf, math.inf)
    assert sqnr_interval(LOGITS[:1] + 1, LOGITS[:1]) == (-math.inf, math.inf)
    broken = LOGITS.copy()
    broken[0, 0] = np.nan
    assert sqnr_interval(broken, LOGITS) == (-math.inf, math.inf)
    assert sqnr_interval(np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)) == (-math.inf, math.inf)


def test_paired_drop_by_hand() -> None:
    # 98 pairs, 4 lost, 1 won. With half a pair in each cell: n 100, difference 3 / 100,
    # standard error sqrt(5 + 1 - 3^2 / 100) / 100 = 0.0243105, times 1.959964 = 0.0476477
    drop, (low, high) = paired_drop(*outcomes(80, 4, 1, 13))
    assert drop == pytest.approx(100 * 3 / 98)
    assert low == pytest.approx(3 - 4.76477, abs=1e-4)
    assert high == pytest.approx(3 + 4.76477, abs=1e-4)


def test_paired_drop_is_positive_when_worse_and_turns_round() -> None:
    worse, better = outcomes(50, 10, 2, 38), outcomes(50, 2, 10, 38)
    drop, (low, high) = paired_drop(*worse)
    gain, (gain_low, gain_high) = paired_drop(*better)
    assert drop == pytest.approx(8.0)
    assert (gain, gain_low, gain_high) == pytest.approx((-drop, -high, -low))
    assert low > 0


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_interval_without_changes_holds_zero_and_has_a_width(count: int) -> None:
    drop, (low, high) = paired_drop(*outcomes(count, 0, 0, 0))
    assert drop == 0
    assert low < 0 < high
    assert low == pytest.approx(-high)
    assert high == pytest.approx(100 * 1.959964 / (count + 2))


@pytest.mark.parametrize(("lost", "won", "count"), [(0.03, 0.02, 500), (0.01, 0.01, 2000), (0.10, 0.02, 200)])
def test_interval_covers_the_true_drop_95_times_in_100(lost: float, won: float, count: int) -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(4000):
        cells = generator.multinomial(count, [0.7, lost, won, 0.3 - lost - won])
        _, (low, high) = paired_drop(*outcomes(*cells))
        covered += low <= 100 * (lost - won) <= high
    assert 0.94 <= covered / 4000 <= 0.965


def test_compare() -> None:
    labels = np.array([0, 0, 1, 1, 1, 1, 2, 2])
    reference = 9 * one_hot([0, 0, 1, 1, 1, 0, 2, 0], 3)
    logits = 9 * one_hot([0, 0, 1, 0, 1, 1, 0, 0], 3)
    accuracy = compare(logits, reference, labels)
    assert accuracy.top1 == pytest.approx(5 / 8)
    assert accuracy.top5 == 1.0
    assert accuracy.drop_points == pytest.approx(100 / 8)  # lost images 3 and 6, won 5
    assert accuracy.drop_ci95 == paired_drop(hits(reference, labels, 1), hits(logits, labels, 1))[1]
    assert accuracy.agreement == pytest.approx(5 / 8)
    assert accuracy.agreement_ci95 == wilson_interval(5, 8)
    assert accuracy.sqnr_db == pytest.approx(10 * math.log10(8 / 6))
    assert accuracy.sqnr_ci95 == sqnr_interval(logits, reference)
    assert accuracy.worst_class == 2
    assert accuracy.worst_class_drop_points == pytest.approx(50.0)


@pytest.mark.parametrize(("value", "expected"), [(3, 999), (math.nan, -999), (math.inf, -999)])
def test_sqnr_of_a_comparison_is_finite(value: float, expected: float) -> None:
    logits = LOGITS.copy()
    logits[0, 0] = value  # 3: as it was
    accuracy = compare(logits, LOGITS, np.array([0, 3, 1]))
    assert accuracy.sqnr_db == expected
    assert accuracy.sqnr_ci95 == ((999, 999) if expected == 999 else (-999, 999))


def test_worst_class_is_the_class_itself_when_classes_are_missing() -> None:
    labels = np.array([3, 3, 7, 7])
    reference = one_hot([3, 3, 7, 7], 9)
    accuracy = compare(one_hot([3, 3, 7, 1], 9), reference, labels)
    assert accuracy.worst_class == 7
    assert accuracy.worst_class_drop_points == pytest.approx(50.0)


def test_baseline_that_guesses_is_refused() -> None:
    generator = np.random.default_rng(0)
    logits, labels = generator.standard_normal((500, 10), np.float32), generator.integers(0, 10, 500)
    with pytest.raises(CheckFailed, match=r"top-1 is \d+\.\d% on 500 images, no better than guessing \(10\.0%\)"):
        check_baseline(logits, labels)


@pytest.mark.parametrize(("right", "accepted"), [(14, False), (19, False), (20, True), (100, True)])
def test_baseline_bound(right: int, accepted: bool) -> None:
    # 100 images of 10 classes: chance 10, three standard deviations 3 * sqrt(100 * 0.1 * 0.9) = 9
    labels = np.arange(100) % 10
    logits = one_hot([int(c) if i < right else int(c + 1) % 10 for i, c in enumerate(labels)], 10)
    if accepted:
        check_baseline(logits, labels)
    else:
        with pytest.raises(CheckFailed, match="no better than guessing"):
            check_baseline(logits, labels)


@pytest.mark.parametrize("drop", [0.05, 0.15, 0.3, 1.0, 5.0])
def test_fewest_images_that_can_show_a_drop(drop: float) -> None:
    count = images_that_show(drop)
    assert count == pytest.approx(196 / drop, abs=3)  # as the documents say
    unchanged = np.ones(count, bool)
    assert paired_drop(unchanged, unchanged)[1][1] <= drop < paired_drop(unchanged[1:], unchanged[1:])[1][1]


def test_top5_is_of_five() -> None:
    logits = np.tile(np.arange(8, dtype=np.float32), (4, 1))  # places of the classes: 7, 6, 5, ...
    assert compare(logits, logits, np.array([7, 3, 2, 0])).top5 == 0.5


@pytest.mark.parametrize(("classes", "count"), [(2, 10), (4, 4), (10, 2), (1000, 1)])
def test_fewest_images_that_can_pass_the_baseline(classes: int, count: int) -> None:
    assert images_to_judge(classes) == count
    labels = np.arange(count) % classes
    check_baseline(one_hot(labels.tolist(), classes), labels)
    if count > 1:
        with pytest.raises(CheckFailed, match="no better than guessing"):
            check_baseline(one_hot(labels[:-1].tolist(), classes), labels[:-1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_baseline_that_is_not_finite_is_refused(value: float) -> None:
    logits = one_hot([0, 1, 2, 3] * 10, 4)
    logits[17, 2] = value
    with pytest.raises(CheckFailed, match="not finite"):
        check_baseline(logits, np.array([0, 1, 2, 3] * 10))


def test_wilson_interval_by_hand() -> None:
    low, high = wilson_interval(45, 50)  # the classic example: 90 % of 50
    assert (low, high) == pytest.approx((0.7864, 0.9565), abs=1e-4)
    assert all(wilson_interval(0, count)[0] == pytest.approx(0.0, abs=1e-12) for count in range(1, 100))
    assert all(wilson_interval(count, count)[1] == pytest.approx(1.0) for count in range(1, 100))
    assert all(0 <= end <= 1 for count in range(1, 100) for right in (0, count) for end in wilson_interval(right, count))
