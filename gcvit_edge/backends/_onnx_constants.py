"""Constants that are stored in INT8 and used in float: written so that ONNX Runtime converts them once, when it loads a model.

It folds any operator on constants but DequantizeLinear, which it leaves for fusions with integer kernels and runs again in every
inference: for the position biases and gates of GC ViT-XXT that was 4 % of the time. Cast and Mul are folded.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto


def fold_at_load(model: "ModelProto") -> None:
    """Replaces DequantizeLinear of symmetric INT8 initializers by Cast and Mul, in place."""
    from onnx import helper, numpy_helper

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if not _is_symmetric(node, tensors):
            nodes.append(node)
            continue
        scale = numpy_helper.to_array(tensors[node.input[1]])
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        rank = len(tensors[node.input[0]].dims)
        shape = [-1 if index == axis % rank else 1 for index in range(rank)] if scale.ndim else []
        factor = numpy_helper.from_array(np.ascontiguousarray(scale.reshape(shape)), f"{node.output[0]}.scale")
        graph.initializer.append(factor)
        nodes.append(helper.make_node("Cast", [node.input[0]], [f"{node.output[0]}.values"], to=1))  # FLOAT
        nodes.append(helper.make_node("Mul", [f"{node.output[0]}.values", factor.name], [node.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _is_symmetric(node: "NodeProto", tensors: "dict[str, TensorProto]") -> bool:
    """Whether it takes an INT8 initializer to float by a scale a tensor or a channel, with zero points of 0."""
    from onnx import TensorProto, numpy_helper

    names = [name for name in node.input if name]
    if node.op_type != "DequantizeLinear" or not tensors.keys() >= set(names):
        return False
    values, scale, *zero_points = (tensors[name] for name in names)
    by_block = any(attribute.name == "block_size" and attribute.i for attribute in node.attribute)
    is_shifted = any(numpy_helper.to_array(zero_point).any() for zero_point in zero_points)
    return (values.data_type, scale.data_type) == (TensorProto.INT8, TensorProto.FLOAT) and not by_block and not is_shifted
