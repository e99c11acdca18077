"""Answers that are compared before artifacts are timed say something of every layer."""

import numpy as np
import pytest
import torch
from programs import benchmark_program

from gcvit_edge.measurement.accuracy import sqnr_db


@pytest.mark.parametrize("part", ["attn.proj", "mlp.fc2"])
def test_random_networks_show_what_their_blocks_compute(part: str) -> None:
    """GC ViT-S and larger start with layer scales of 1e-5, with which a network without blocks would answer the same."""
    model = benchmark_program("_random_network").random_network("gcvit_small")
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32))
    with torch.no_grad():
        expected = model(image).numpy()
        for name, layer in model.named_modules():
            if name.endswith(part):
                torch.nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        assert sqnr_db(model(image).numpy(), expected) < 10
