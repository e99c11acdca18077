"""A bundle that every target can run something of."""

from pathlib import Path

import pytest
import torch

from gcvit_edge import create_model, export_float
from gcvit_edge.bundle import Bundle
from gcvit_edge.model.checkpoint import save_checkpoint
from gcvit_edge.model.create import describe_model


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A random network of one block a stage, as float artifacts of a runtime for devices and one for everything else."""
    folder: Path = tmp_path_factory.mktemp("targets")
    torch.manual_seed(0)
    model = create_model(dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)
    save_checkpoint(model, describe_model(model), folder / "weights.safetensors", half=False)
    output = folder / "bundle"
    return export_float(weights=str(folder / "weights.safetensors"), backends=["executorch", "onnx"], output=output, threads=1)
