"""Answers that are compared before artifacts are timed say something of every layer."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from gcvit_edge.measurement.accuracy import sqnr_db

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("part", ["attn.proj", "mlp.fc2"])
def test_random_networks_show_what_their_blocks_compute(part: str) -> None:
    """GC ViT-S and larger start with layer scales of 1e-5, with which a network without blocks would answer the same."""
    file = FOLDER / "_random_network.py"
    if not file.is_file():
        pytest.skip("a source distribution has no benchmarks")
    spec = importlib.util.spec_from_file_location("random_network", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.random_network("gcvit_small")
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32))
    with torch.no_grad():
        expected = model(image).numpy()
        for name, layer in model.named_modules():
            if name.endswith(part):
                torch.nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        assert sqnr_db(model(image).numpy(), expected) < 10
