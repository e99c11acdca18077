"""Our own operators of PyTorch in ONNX, which no exporter knows: products with activations rounded when they run, and with INT4 weights."""

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.quantization import layers
from gcvit_edge.quantization.integers import GroupedWeight

if TYPE_CHECKING:
    from onnx import ModelProto


def translations() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export`: our own operators of PyTorch, and what they are in ONNX."""
    return {
        layers.dynamic_linear._opoverload: _dynamic_linear,
        layers.dynamic_conv._opoverload: _dynamic_conv,
        layers.grouped_linear._opoverload: _grouped_linear,
    }


def _dynamic_linear(x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    integers, step, zero_point = _op().DynamicQuantizeLinear(x)
    return _product(integers, step, zero_point, weight, scale, bias)


def _dynamic_conv(
    x: Any, weight: Any, scale: Any, bias: Any, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Any:  # fmt: skip
    """The pixels that each output reads side by side, in integers, and a product: ConvInteger takes twice the time of a float convolution.
    One Gather takes half of the time of a Slice for each pixel and a Concat: ONNX Runtime divides it among threads. It drops the changes of
    layout where tokens are on the other side of them."""
    import onnx_ir

    op = _op()
    integers, step, zero_point = op.DynamicQuantizeLinear(op.Transpose(x, perm=[0, 2, 3, 1]))
    images, channels, height, width = x.shape
    more = weight.shape[0] // prod(kernel) - channels  # channels of zeros
    padded = op.Pad(integers, _integers(op, [0, *padding, 0, 0, *padding, more]), zero_point)
    rows, columns = height + 2 * padding[0], width + 2 * padding[1]
    starts = [np.arange(0, side - size + 1, by) for side, size, by in zip((rows, columns), kernel, stride, strict=True)]
    read = _pixels(starts, columns)[:, None] + _pixels([np.arange(size) for size in kernel], columns)
    places = op.Constant(value=onnx_ir.tensor(read.astype(np.int32)))
    pixels = op.Gather(op.Reshape(padded, _integers(op, [images, rows * columns, channels + more])), places, axis=1)
    side_by_side = op.Reshape(pixels, _integers(op, [images, *map(len, starts), weight.shape[0]]))
    return op.Transpose(_product(side_by_side, step, zero_point, weight, scale, bias), perm=[0, 3, 1, 2])


def _pixels(places: Sequence[NDArray[np.int64]], columns: int) -> NDArray[np.int64]:
    """Which pixels are at some rows and columns of a feature map that is so many columns wide."""
    rows, along = places
    return (rows[:, None] * columns + along).ravel()


def _product(integers: Any, step: Any, zero_point: Any, weight: Any, scale: Any, bias: Any) -> Any:
    """What ONNX Runtime fuses: with the rounding before it into DynamicQuantizeMatMul, else into MatMulIntegerToFloat."""
    op = _op()
    y = op.Mul(op.Cast(op.MatMulInteger(integers, weight, zero_point), to=1), op.Mul(step, scale))  # to FLOAT
    return y if bias is None else op.Add(y, bias)


def _op() -> Any:
    import onnxscript

    return onnxscript.opset23  # its operators are typed as optional


def _integers(op: Any, values: Sequence[int]) -> Any:
    return op.Constant(value_ints=list(values))


def _grouped_linear(x: Any, values: Any, scale: Any, rounded: bool) -> Any:
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    # of what ONNX Runtime contributes, onnxscript knows no schema; weights are INT8 until they are packed
    integers = [OpSchema.Attribute(name, OpSchema.AttrType.INT, "") for name in ("K", "N", "bits", "block_size", "accuracy_level")]
    inputs = [OpSchema.FormalParameter(name, kind) for name, kind in (("A", "T"), ("B", "tensor(int8)"), ("scales", "T"))]
    schema = OpSchema(
        "MatMulNBits", "com.microsoft", 1, inputs=inputs, outputs=[OpSchema.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")], attributes=integers,
    )  # fmt: skip
    outputs, channels = values.shape
    operator: Any = Op(Opset("com.microsoft", 1), "MatMulNBits", schema)
    level = 4 if rounded else 1  # activations in INT8, or in float
    return operator(x, values, scale, K=int(channels), N=int(outputs), bits=4, block_size=GroupedWeight.GROUP, accuracy_level=level)


def pack_grouped_weights(model: "ModelProto") -> None:
    """Weights of MatMulNBits: two values a byte, the first in the lower half, each 8 too high; scales as float in one row.

    They were INT8 until now, since PyTorch has no type of 4 bits that exporters know.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            weight, scale = (tensors[name] for name in node.input[1:3])
            values = (numpy_helper.to_array(weight) + 8).astype(np.uint8).reshape(weight.dims[0], -1, GroupedWeight.GROUP)
            weight.CopyFrom(numpy_helper.from_array(values[..., ::2] | values[..., 1::2] << 4, weight.name))
            scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale).reshape(-1), scale.name))
