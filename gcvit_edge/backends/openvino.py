"""OpenVINO: IR (.xml and .bin), with FakeQuantize where its plugins compute in INT8.

Sources: OpenVINO 2026, "Low Precision Transformations" and "PyTorch frontend extensions"; Model API conventions for `model_info`.
"""

import re
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.artifact import Precision
from gcvit_edge.measurement.operators import Kind, TimedOperator
from gcvit_edge.model.form import Form
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.recipe import X86, Operator

if TYPE_CHECKING:
    from openvino import CompiledModel, Model, Output
    from openvino.frontend import NodeContext
    from torch import Tensor, nn

    from gcvit_edge.backends import Runner
    from gcvit_edge.model.info import ModelInfo

INTEGER_OPERATORS: frozenset[Operator] = frozenset({"linear", "conv", "attention", "residual"})
PRECISIONS: frozenset[Precision] = frozenset({"int8", "int4", "fp16", "bf16"})
ARTIFACT = "openvino/model.{precision}.xml"
PACKAGES = ("openvino", "torch")

DECOMPOSED = ("conv2d", "matmul", "max_pool2d", "reshape", "softmax.int", "to.dtype", "_unsafe_view")  # of the rest its frontend knows


def form(operators: frozenset[Operator]) -> Form:
    """OpenVINO finds RMS norms and attention in plain operators, the latter where queries, keys and values are batched alike."""
    return Form(norm="operator", attention="windows", gains="none")


def arithmetic(operators: frozenset[Operator], x86: X86) -> Arithmetic:
    """Static scales alone; kernels answer in float, with rounding fused where integers follow. Late 1x1 convolutions in float take 1.4 %
    of the time (benchmarks/NOTES.md), and are a third to two thirds of the noise in integers. Without VNNI oneDNN has a general product
    for linears, slower than float's, and kernels of its own for convolutions."""
    return Arithmetic(activations="uint8", late_pointwise="weights", static_linear="conv" if x86 == "avx2" else "linear")


def capture(deployed: "nn.Module", example: "Tensor") -> "Model":
    """Converts with OpenVINO's PyTorch frontend; rounding to integers becomes FakeQuantize, which OpenVINO turns into INT8 kernels."""
    import openvino
    import torch
    from openvino.frontend.pytorch import ConversionExtension

    from gcvit_edge.backends._decompositions import decompose, without_retrace

    translations = {
        "quantize_per_tensor": _fake_quantize, "dequantize_per_tensor": _dequantize, "dequantize_per_channel": _dequantize,
        "dequantize_per_channel_group": _dequantize_groups,
    }  # fmt: skip
    program = decompose(torch.export.export(deployed, (example,)), DECOMPOSED)
    with without_retrace():
        graph = openvino.convert_model(
            program,
            input=list(example.shape),  # else the shape is dynamic, and layouts are converted for nothing
            extension=[ConversionExtension(f"quantized_decomposed.{name}.default", each) for name, each in translations.items()],
        )
    graph.inputs[0].set_names({"image"})
    graph.outputs[0].set_names({"logits"})
    return graph


def _fake_quantize(context: "NodeContext") -> "list[Output]":
    """(x, scale, zero point, lowest, highest, dtype), rounded and back in one operator."""
    from openvino import opset15 as ops

    scale, zero_point, lowest, highest = (context.get_values_from_const_input(index) for index in range(1, 5))
    low, high = (ops.constant(np.float32((end - zero_point) * scale)) for end in (lowest, highest))
    return ops.fake_quantize(context.get_input(0), low, high, low, high, highest - lowest + 1).outputs()


def _dequantize(context: "NodeContext") -> "list[Output]":
    """Weights and constants to float, by a scale a tensor or a channel; activations are float already, see above."""
    from openvino import opset15 as ops

    x = context.get_input(0)
    if not x.get_element_type().is_integral():
        return [x]
    scale = np.asarray(context.get_values_from_const_input(1), np.float32)
    shape = [-1] + [1] * (len(x.get_partial_shape()) - 1) if scale.size > 1 else []
    return ops.multiply(ops.convert(x, "f32"), ops.constant(scale.reshape(shape))).outputs()


def _dequantize_groups(context: "NodeContext") -> "list[Output]":
    """INT4 weights with one scale a group of input channels, as OpenVINO's compressed weights are written."""
    import openvino
    from openvino import opset15 as ops

    values = context.get_input(0).get_node().data  # INT8 is not among what get_values_from_const_input gives
    scale = np.asarray(context.get_values_from_const_input(1), np.float32)
    groups = values.reshape(*scale.shape, -1)
    pairs = groups.astype(np.uint8).reshape(-1, 2) & 15
    packed = openvino.Tensor(openvino.Type.i4, openvino.Shape(groups.shape))  # of its own memory: an array's would be shared, and freed
    packed.data.reshape(-1)[:] = (pairs[:, 0] | pairs[:, 1] << 4).view(packed.data.dtype)
    weight = ops.multiply(ops.convert(openvino.op.Constant(packed), "f32"), ops.constant(scale[..., None]))
    return ops.reshape(weight, ops.constant(np.array(values.shape)), False).outputs()


def save(graph: "Model", path: Path, info: "ModelInfo") -> list[Path]:
    """Writes .xml and .bin, with labels and preprocessing as `model_info` (OpenVINO Model API)."""
    import openvino

    preprocessing = info.preprocessing
    model_info = {
        "model_type": "Classification",
        "labels": " ".join(name.replace(" ", "_") for name in info.labels.names),
        "mean_values": " ".join(str(round(255 * value, 6)) for value in preprocessing.mean),
        "scale_values": " ".join(str(round(255 * value, 6)) for value in preprocessing.std),
        "reverse_input_channels": "YES",
        "resize_type": "standard" if preprocessing.mode == "squash" else "crop",
        "resize": str(preprocessing.resize),
        "interpolation_mode": {"bicubic": "CUBIC", "bilinear": "LINEAR", "nearest": "NEAREST"}[preprocessing.interpolation],
        "topk": str(min(5, len(info.labels.names))),
        "license": info.origin.licence,
    }
    for key, value in model_info.items():
        graph.set_rt_info(value, ["model_info", key])
    # else the CPU plugin rounds activations of linears with INT4 weights, where it sees fit
    graph.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    _name_nodes(graph, info.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(graph, path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def _name_nodes(graph: "Model", name: str) -> None:
    """Numbers what OpenVINO numbers by a counter of the process, so that a model's file is the same whatever was converted before it.

    Those are nodes without a name of the PyTorch graph, which has dots and slashes: `Constant_366`.
    """
    graph.set_friendly_name(name)
    for index, node in enumerate(graph.get_ordered_ops()):
        if re.fullmatch(r"[A-Za-z]+_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{index}")


def import_runtime() -> str:
    import openvino

    return openvino.__name__


def load(path: Path, threads: int) -> "Runner":
    """Compiles the IR for the CPU, for latency, in float32 where it is not integer."""
    request = _compile(path, threads, {}).create_infer_request()

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return request.infer([image])[0].copy()

    return run


def _compile(path: Path, threads: int, more: dict[str, Any]) -> "CompiledModel":
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": threads > 1,  # a single thread is pinned to the first CPU, that of every other such process
    }
    return openvino.Core().compile_model(path, "CPU", options | more)


def requirements(path: Path) -> dict[str, Any]:
    """IR is read by the OpenVINO that wrote it and later ones; the operators are those of the graph."""
    import openvino

    operators = sorted({op.get_type_name() for op in openvino.Core().read_model(path).get_ops()})
    return {"runtime": "openvino", "minimum_version": version("openvino"), "delegates": [], "operators": operators}


_KINDS: dict[str, Kind] = {
    "FullyConnected": "matrix", "FullyConnectedQuantizedLegacy": "matrix", "FullyConnectedCompressed": "matrix", "Convolution": "matrix",
    "GroupConvolution": "matrix", "MatMul": "matrix", "FakeQuantize": "quantization", "Convert": "quantization", "Transpose": "layout",
    "Reorder": "layout", "Reshape": "layout", "Broadcast": "layout",
}  # fmt: skip


def profile(path: Path, threads: int, image: NDArray[np.float32], runs: int) -> tuple[list[TimedOperator], int | None]:
    """From OpenVINO's performance counters; attention is a fused "Subgraph", one product, and in integers if
    its first product is. Source: OpenVINO documentation, "Performance counters"."""
    from openvino import ProfilingInfo

    request = _compile(path, threads, {"PERF_COUNT": True}).create_infer_request()
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for _ in range(runs):
        request.infer([image])
        for node in request.profiling_info:
            if node.status != ProfilingInfo.Status.EXECUTED:
                continue
            times[node.node_name, node.node_type, node.exec_type].append(node.real_time.total_seconds() * 1000)

    def operator(name: str, node: str, execution: str, ms: float) -> TimedOperator:
        kind = _kind(name, node)
        integer = kind == "matrix" and execution.lower().endswith(("_i8", "_u8"))
        return TimedOperator(name, _label(kind, node, execution), kind, ms, integer)

    return [operator(*key, float(np.median(values))) for key, values in times.items()], None


def _label(kind: Kind, node: str, execution: str) -> str:
    fused = {"matrix": "attention", "quantization": "rounding", "other": "elementwise"}.get(kind, "")
    return f"{node}{f' of {fused}' if node == 'Subgraph' else ''}, {execution.rsplit('_', 1)[-1].lower()}"


def _kind(name: str, node: str) -> Kind:
    if node == "Subgraph":  # what the CPU plugin has fused goes by the name of its last operator
        if "FakeQuantize" in name or "fq_" in name:
            return "quantization"
        return "matrix" if name.rsplit("/", 1)[-1] in ("Transpose", "MatMul") else "other"
    return _KINDS.get(node, "other")
