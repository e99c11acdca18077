"""Our own operators of PyTorch answer in ONNX Runtime as they do in PyTorch, and it fuses them as intended."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from gcvit_edge.backends.onnx import capture
from gcvit_edge.quantization.layers import DynamicConv, DynamicLinear


def session(layer: nn.Module, example: torch.Tensor, folder: Path) -> onnxruntime.InferenceSession:
    onnx.save(capture(layer, example), folder / "layer.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    return onnxruntime.InferenceSession(folder / "layer.onnx", options)


def kinds(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
@pytest.mark.parametrize(("kernel", "stride", "padding", "bias"), [(3, 2, 1, True), (3, 1, 1, False), (2, 2, 0, True), (1, 1, 0, False)])
def test_dynamic_convolutions(size: tuple[int, int], kernel: int, stride: int, padding: int, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = DynamicConv(nn.Conv2d(5, 6, kernel, stride, padding, bias=bias))
    x = torch.randn(1, 5, *size) + 0.3
    run = session(layer, x, tmp_path)
    with torch.no_grad():
        np.testing.assert_allclose(run.run(None, {"image": x.numpy()})[0], layer(x), rtol=1e-4, atol=1e-4)
    assert kinds(tmp_path)["MatMulIntegerToFloat"] == 1


def test_dynamic_linears(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = DynamicLinear(nn.Linear(7, 5)), torch.randn(20, 7)
    run = session(layer, x, tmp_path)
    with torch.no_grad():
        np.testing.assert_allclose(run.run(None, {"image": x.numpy()})[0], layer(x), rtol=1e-4, atol=1e-4)
    assert kinds(tmp_path) == {"DynamicQuantizeMatMul": 1}
