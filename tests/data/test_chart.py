"""The test chart: mistakes of preprocessing show on it."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from gcvit_edge.data import Preprocessing, draw_chart


def test_it_is_always_the_same() -> None:
    assert draw_chart().size == (500, 375)
    assert hashlib.sha256(draw_chart().tobytes()).hexdigest().startswith("5d534627b1c6e2a12efa88c48b9c21ca")


@pytest.mark.parametrize(
    "mistake",
    [
        lambda chart: chart.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda chart: chart.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        lambda chart: chart.transpose(Image.Transpose.TRANSPOSE),
        lambda chart: Image.merge("RGB", chart.split()[::-1]),
        lambda chart: chart.crop((2, 0, 500, 375)),
    ],
    ids=["mirrored", "upside down", "transposed", "BGR", "shifted"],
)
def test_other_pixels_show(mistake) -> None:
    preprocessing = Preprocessing()
    right, wrong = preprocessing.pixels(draw_chart()), preprocessing.pixels(mistake(draw_chart()))
    assert np.abs(right.astype(int) - wrong).max() > 20


@pytest.mark.parametrize("changes", [{"interpolation": "bilinear"}, {"interpolation": "nearest"}, {"resize": 255}, {"mode": "squash"}])
def test_another_rule_shows(changes: dict) -> None:
    right, wrong = Preprocessing().pixels(draw_chart()), Preprocessing(**changes).pixels(draw_chart())
    assert np.abs(right.astype(int) - wrong).max() > 20


def test_resizing_without_antialiasing_shows() -> None:
    chart, preprocessing = draw_chart(), Preprocessing(size=(64, 64), resize=73)
    nearest_pixel = chart.resize((chart.width * 73 // 375, 73), Image.Resampling.NEAREST)
    assert np.abs(preprocessing.pixels(chart).astype(int) - preprocessing.pixels(nearest_pixel)).max() > 20
