"""Constants in INT8 are converted when a model is loaded, never when it runs."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from gcvit_edge.backends._onnx_constants import fold_at_load

VALUES = np.random.default_rng(0).integers(-127, 128, (6, 3, 2, 2)).astype(np.int8)


def model(nodes: list[onnx.NodeProto], **tensors: np.ndarray) -> onnx.ModelProto:
    """A graph of x (2, 3, 5, 5) -> y."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 6, 4, 4])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def answer(graph: onnx.ModelProto) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((2, 3, 5, 5), np.float32)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def run_time_operators(graph: onnx.ModelProto, folder: Path) -> Counter[str]:
    """What is left when ONNX Runtime has folded what it folds."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("axis", [0, 1, -3, None])
def test_a_float_convolution(tmp_path: Path, axis: int | None) -> None:
    length = () if axis is None else (VALUES.shape[axis],)
    scale = np.random.default_rng(2).uniform(0.01, 0.1, length).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["weight"], **({} if axis is None else {"axis": axis})),
        helper.make_node("Conv", ["x", "weight"], ["y"]),
    ]
    graph = model(nodes, w=VALUES, scale=scale, zero=np.zeros(length, np.int8))
    before = answer(graph)
    assert run_time_operators(graph, tmp_path) == {"DequantizeLinear": 1, "Conv": 1}  # else there is no need for all this
    fold_at_load(graph)
    onnx.checker.check_model(graph)
    np.testing.assert_allclose(answer(graph), before, rtol=1e-5, atol=1e-5)  # the weight may be laid out for another kernel now
    assert run_time_operators(graph, tmp_path) == {"Conv": 1}
    assert {tensor.data_type for tensor in graph.graph.initializer} == {TensorProto.INT8, TensorProto.FLOAT}
    assert len(graph.graph.initializer) == 2


@pytest.mark.parametrize(
    ("values", "zero"), [(VALUES, np.int8(3)), (VALUES.view(np.uint8), np.uint8(128)), (VALUES.view(np.uint8), None)],
    ids=["shifted", "shifted UINT8", "UINT8"],
)  # fmt: skip
def test_other_constants_stay(values: np.ndarray, zero: np.integer | None) -> None:
    zeros = {} if zero is None else {"zero": np.array(zero)}
    nodes = [helper.make_node("DequantizeLinear", ["w", "scale", *zeros], ["weight"]), helper.make_node("Conv", ["x", "weight"], ["y"])]
    graph = model(nodes, w=values, scale=np.array(0.1, np.float32), **zeros)
    before = answer(graph)
    fold_at_load(graph)
    assert [node.op_type for node in graph.graph.node] == ["DequantizeLinear", "Conv"]
    np.testing.assert_array_equal(answer(graph), before)
