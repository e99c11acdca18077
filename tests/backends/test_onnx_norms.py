"""RMS norms are fused with the additions before them, exactly."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxscript import ir

from gcvit_edge.backends._onnx_norms import fuse_norms

WEIGHT = np.random.default_rng(0).uniform(0.5, 2, 6).astype(np.float32)


def model(nodes: list[onnx.NodeProto], outputs: list[str], other: tuple[int, ...] = (5, 6)) -> onnx.ModelProto:
    """A graph of x (5, 6) and other -> outputs (5, 6)."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 6]), helper.make_tensor_value_info("other", TensorProto.FLOAT, other)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [5, 6]) for name in outputs],
        [numpy_helper.from_array(WEIGHT, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def norm(x: str, y: str, axis: int = -1) -> onnx.NodeProto:
    return helper.make_node("RMSNormalization", [x, "weight"], [y], axis=axis, epsilon=1e-5, stash_type=1)


def fused(graph: onnx.ModelProto) -> onnx.ModelProto:
    rewritten = ir.from_proto(onnx.shape_inference.infer_shapes(graph))  # as exporters write them
    fuse_norms(rewritten)
    result = ir.to_proto(rewritten)
    onnx.checker.check_model(result, full_check=True)
    return result


def answers(graph: onnx.ModelProto, scale: float = 1.0) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    feed = {each.name: scale * random.standard_normal([d.dim_value for d in each.type.tensor_type.shape.dim], np.float32)
            for each in graph.graph.input}  # fmt: skip
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.asarray(each) for each in session.run(None, feed)]


def kinds(graph: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph.node)


@pytest.mark.parametrize("scale", [1.0, 1e-3])  # with 1e-3 the epsilon is most of what is under the root
def test_a_norm_alone(scale: float) -> None:
    graph = model([norm("x", "y")], ["y"])
    result = fused(graph)
    assert kinds(result) == {"SkipSimplifiedLayerNormalization": 1}
    np.testing.assert_allclose(answers(result, scale)[0], answers(graph, scale)[0], rtol=1e-6)


@pytest.mark.parametrize("attributes", [{}, {"axis": 1}, {"epsilon": 1e-5}, {"epsilon": 1e-3}])
def test_attributes_are_optional(attributes: dict[str, float]) -> None:
    graph = model([helper.make_node("RMSNormalization", ["x", "weight"], ["y"], **attributes)], ["y"])
    result = fused(graph)
    assert kinds(result) == {"SkipSimplifiedLayerNormalization": 1}
    np.testing.assert_allclose(answers(result, 1e-2)[0], answers(graph, 1e-2)[0], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_sum_and_its_norm(scale: float) -> None:
    graph = model([helper.make_node("Add", ["x", "other"], ["sum"]), norm("sum", "y")], ["y"])
    result = fused(graph)
    assert kinds(result) == {"SkipSimplifiedLayerNormalization": 1}
    np.testing.assert_allclose(answers(result, scale)[0], answers(graph, scale)[0], rtol=1e-6)


def test_a_sum_that_others_read_too() -> None:
    nodes = [helper.make_node("Add", ["x", "other"], ["sum"]), norm("sum", "y"), helper.make_node("Mul", ["sum", "y"], ["z"])]
    graph = model(nodes, ["y", "z", "sum"])
    result = fused(graph)
    assert kinds(result) == {"SkipSimplifiedLayerNormalization": 1, "Mul": 1}
    for got, expected in zip(answers(result), answers(graph), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_chain_of_residuals() -> None:
    nodes = [
        norm("x", "a"),
        helper.make_node("Add", ["x", "a"], ["s"]),
        norm("s", "b"),
        helper.make_node("Add", ["s", "b"], ["t"]),
        norm("t", "y"),
    ]
    graph = model(nodes, ["y"])
    result = fused(graph)
    assert kinds(result) == {"SkipSimplifiedLayerNormalization": 3}
    np.testing.assert_allclose(answers(result)[0], answers(graph)[0], rtol=1e-5)


def test_a_sum_that_repeats_a_row_is_added_before() -> None:
    graph = model([helper.make_node("Add", ["x", "other"], ["sum"]), norm("sum", "y")], ["y"], other=(1, 6))
    result = fused(graph)
    assert kinds(result) == {"Add": 1, "SkipSimplifiedLayerNormalization": 1}
    np.testing.assert_allclose(answers(result)[0], answers(graph)[0], rtol=1e-6)


def test_a_norm_over_more_axes_stays() -> None:
    whole = numpy_helper.from_array(np.ones((5, 6), np.float32), "whole")
    graph = model([helper.make_node("RMSNormalization", ["x", "whole"], ["y"], axis=0, epsilon=1e-5)], ["y"])
    graph.graph.initializer.append(whole)
    assert kinds(fused(graph)) == {"RMSNormalization": 1}
