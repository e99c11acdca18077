"""Position biases become tables that ONNX Runtime looks up when it loads a model: smaller files, the same logits to the bit."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from gcvit_edge.backends import onnx as backend
from gcvit_edge.backends._fast_export import fast_export
from gcvit_edge.backends._onnx_position_bias import index_of, table_of, window_of
from gcvit_edge.lower import simulate
from gcvit_edge.model.create import create_model
from gcvit_edge.model.deploy import deploy, rewrite
from gcvit_edge.model.gcvit import GCViT, RelativePositionBias
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.recipe import parse_recipe, recipe_text

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((16, 3, 64, 64), np.float32)]
BLOCKS = 5


def model() -> GCViT:
    torch.manual_seed(0)
    return create_model(dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=4, img_size=64)


def written(recipe: str | None) -> nn.Module:
    """What is exported for a recipe, or in float."""
    if recipe is None:
        return rewrite(deploy(model()), backend.form(frozenset()))
    parsed = parse_recipe(recipe_text(recipe), recipe)
    return simulate("onnx", calibrate(model(), parsed, lambda: iter(IMAGES)), parsed)


def captured(network: nn.Module) -> onnx.ModelProto:
    with fast_export():
        return backend.capture(network, torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("window", [(7, 7), (3, 5), (2, 2), (1, 6)])
def test_windows_are_found(window: tuple[int, int]) -> None:
    module = RelativePositionBias(window, num_heads=3)
    bias = module()[None].detach().numpy()
    assert window_of(bias) == window
    np.testing.assert_array_equal(index_of(window), module.relative_position_index.numpy())
    np.testing.assert_array_equal(table_of(bias, window)[0].T, module.relative_position_bias_table.detach().numpy())


def test_other_constants_have_no_window() -> None:
    bias = RelativePositionBias((3, 5), num_heads=3)()[None].detach().numpy()
    bias[0, 2, 4, 6] += 1e-6
    assert window_of(bias) is None
    assert window_of(np.random.default_rng(0).standard_normal((1, 2, 9, 9))) is None


@pytest.mark.parametrize("recipe", [None, pytest.param("int8_ptq_full", marks=pytest.mark.slow), "fp16"])
def test_the_same_logits_of_smaller_files(recipe: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    network = written(recipe)
    with_tables = captured(network)
    monkeypatch.setattr("gcvit_edge.backends._onnx_position_bias.store_tables", lambda model: None)
    without = captured(network)
    onnx.checker.check_model(with_tables, full_check=True)
    assert len(lookups(with_tables)) == BLOCKS
    assert lookups(without) == []
    saved = sum(size(tensor) for tensor in without.graph.initializer) - sum(size(tensor) for tensor in with_tables.graph.initializer)
    expanded = sum(size(t) for t in without.graph.initializer if len(t.dims) == 4 and t.dims[0] == 1 and t.dims[2] == t.dims[3] > 3)
    assert saved > 0.5 * expanded
    for image in IMAGES[:3]:
        np.testing.assert_array_equal(logits(with_tables, image), logits(without, image))


def test_nothing_is_looked_up_in_an_inference(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(captured(written("int8_ptq")).SerializeToString(), options)
    optimized = onnx.load(tmp_path / "optimized.onnx")
    kinds = {node.op_type for node in optimized.graph.node}
    assert "Attention" in kinds
    assert not kinds & {"Cast", "DequantizeLinear"}
    assert lookups(optimized) == []


def lookups(model: onnx.ModelProto) -> list[str]:
    """Those in tables, (1, heads, positions); convolutions look pixels up, (1, pixels, channels)."""
    return [node.name for node in model.graph.node if node.op_type == "Gather" and node.attribute[0].i == 2]


def size(tensor: onnx.TensorProto) -> int:
    return onnx.numpy_helper.to_array(tensor).nbytes


def logits(graph: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": image})[0])
