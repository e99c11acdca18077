"""Bundles for targets: of a random network of one block a stage, in float."""

from pathlib import Path

import pytest
import torch

from gcvit_edge import create_model, export_float
from gcvit_edge.bundle import Bundle
from gcvit_edge.model.checkpoint import save_checkpoint
from gcvit_edge.model.create import describe_model


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network."""
    path = tmp_path_factory.mktemp("weights") / "one_block.safetensors"
    torch.manual_seed(0)
    model = create_model(dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)
    save_checkpoint(model, describe_model(model), path, half=False)
    return path


@pytest.fixture(scope="session")
def bundle(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its ONNX model: made in a few seconds."""
    return export_float(weights=str(weights), backends=["onnx"], output=tmp_path_factory.mktemp("onnx") / "bundle", threads=1)


@pytest.fixture(scope="session")
def pte_bundle(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its .pte, for devices, and its ONNX model: every target can run one of them."""
    output = tmp_path_factory.mktemp("pte") / "bundle"
    return export_float(weights=str(weights), backends=["executorch", "onnx"], output=output, threads=1)
