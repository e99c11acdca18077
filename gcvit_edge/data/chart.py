"""A picture that shows what preprocessing does to it."""

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375


def draw_chart() -> Image.Image:
    """A test chart, 500x375 pixels in RGB, always the same.

    Red grows to the right and green downwards, by which exchanged axes or channels and a shifted crop show; blue is a zone plate
    (rings that become finer outwards), which any two resampling filters change differently; and in each quarter is a square of a
    colour of its own, which mirroring moves.
    """
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    rings = np.cos(((x - WIDTH // 2) ** 2 + (y - HEIGHT // 2) ** 2) * (np.pi / 500))
    pixels = np.stack([255 * x / (WIDTH - 1), 255 * y / (HEIGHT - 1), 127.5 + 127.5 * rings], axis=-1).round().astype(np.uint8)
    colours = iter([(255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 0)])
    for top in (HEIGHT // 4, 3 * HEIGHT // 4):
        for left in (WIDTH // 3, 2 * WIDTH // 3):
            pixels[top - 15 : top + 15, left - 15 : left + 15] = next(colours)
    return Image.fromarray(pixels)
