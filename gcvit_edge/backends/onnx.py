"""ONNX: a QDQ model for ONNX Runtime, quantized by onnxruntime.quantization.

Source: ONNX Runtime documentation, "Quantize ONNX models".
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.recipe import Operator, Recipe

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from gcvit_edge.backends import Runner
    from gcvit_edge.model.gcvit import GCViT
    from gcvit_edge.model.info import ModelInfo

INTEGER_OPERATORS: frozenset[Operator] = frozenset({"linear", "conv", "attention", "residual"})
ARTIFACT = "model.{precision}.onnx"
RUNTIME = "onnxruntime"
PACKAGES = ("onnxruntime", "onnx", "onnxscript", "torch")

OPSET = 21  # the first with LayerNormalization, Gelu and per-axis Q/DQ that every current runtime and ORT Web has
_INPUT, _OUTPUT = "image", "logits"


def capture(model: "GCViT", info: "ModelInfo") -> "ModelProto":
    """Exports the deploy form, with LayerNorm and GELU as operators: ONNX Runtime has kernels for them."""
    import torch

    from gcvit_edge.model.deploy import Form, deploy

    example = torch.zeros(1, model.config.in_chans, *model.config.img_size)
    program = torch.onnx.export(
        deploy(model, Form(norm="layer_norm")), (example,), dynamo=True, opset_version=OPSET,
        input_names=[_INPUT], output_names=[_OUTPUT], verbose=False,
    )  # fmt: skip
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return program.model_proto


def quantize(graph: "ModelProto", recipe: Recipe, images: Iterable[NDArray[np.float32]]) -> "ModelProto":
    """Static quantization of the recipe's operators to QDQ: U8 activations, S8 weights per channel.

    Position biases are stored as INT8.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples: Iterator[NDArray[np.float32]] = iter(images)

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            sample = next(self.samples, None)
            return None if sample is None else {_INPUT: sample}

    wanted = {"linear": ["Gemm", "MatMul"], "conv": ["Conv"], "attention": ["MatMul", "Softmax"], "residual": ["Add"]}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        original = Path(folder) / "original.onnx"
        onnx.save(graph, original)
        quant_pre_process(original, source, skip_symbolic_shape=True)
        prepared = onnx.load(source)
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=sorted({kind for operator in recipe.operators for kind in wanted[operator]}),
            nodes_to_exclude=[node.name for node in prepared.graph.node if _stays_float(node, prepared, recipe)],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantized = onnx.load(target)
    _store_position_bias_as_int8(quantized)
    return quantized


def _stays_float(node: "NodeProto", graph: "ModelProto", recipe: Recipe) -> bool:
    """Of the operator types that are quantized, the single nodes that are not what the recipe means by them."""
    constants = {initializer.name for initializer in graph.graph.initializer}
    has_constant = any(name in constants for name in node.input)
    if node.op_type == "MatMul":
        return ("linear" if has_constant else "attention") not in recipe.operators
    if node.op_type == "Conv":
        return _INPUT in node.input
    return node.op_type == "Add" and has_constant


def _store_position_bias_as_int8(model: "ModelProto") -> None:
    """Replaces each float position bias by INT8 values and a DequantizeLinear.

    They are 14 % of the float file of XXT, so in float they would be a third of the INT8 one. Their rounding leaves 84 dB.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    for initializer in list(graph.initializer):
        if "position_bias" not in initializer.name or initializer.data_type != 1:
            continue
        name, bias = initializer.name, numpy_helper.to_array(initializer)
        scale = np.float32(np.abs(bias).max() / 127)
        graph.initializer.remove(initializer)
        graph.initializer.append(numpy_helper.from_array(np.round(bias / scale).astype(np.int8), f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(np.asarray(scale), f"{name}_scale"))
        graph.node.insert(0, helper.make_node("DequantizeLinear", [f"{name}_int8", f"{name}_scale"], [name], f"{name}_dequantize"))


def save(graph: "ModelProto", path: Path, info: "ModelInfo") -> list[Path]:
    """Writes one .onnx file, with labels and preprocessing in `metadata_props`."""
    import onnx

    del graph.metadata_props[:]
    properties = {
        "names": json.dumps(dict(enumerate(info.labels.names))),
        "preprocessing": info.preprocessing.model_dump_json(),
        "Image.BitmapPixelFormat": "Rgb8",
        "Image.ColorSpaceGamma": "SRGB",
        "Image.NominalPixelRange": "NominalRange_0_255",
        "model": info.name,
        "license": info.origin.licence,
    }
    onnx.helper.set_model_props(graph, properties)
    onnx.save(graph, path)
    return [path]


def load(path: Path, threads: int) -> "Runner":
    """A CPU session that runs operators one after the other, each on `threads` threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(session.run([_OUTPUT], {_INPUT: image})[0])

    return run


def requirements(path: Path) -> dict[str, Any]:
    """The opset decides the minimum version: opset 21 came with ONNX Runtime 1.18 (its compatibility table)."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    operators = sorted({f"{node.domain + '.' if node.domain else ''}{node.op_type}" for node in model.graph.node})
    return {"runtime": "onnxruntime", "minimum_version": "1.18.0", "delegates": ["CPUExecutionProvider"], "operators": operators}
