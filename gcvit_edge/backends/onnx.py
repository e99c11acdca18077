"""ONNX, for ONNX Runtime: linears and convolutions in dynamic INT8.

Source: ONNX Runtime documentation, "Quantize ONNX models".
"""

import json
import tempfile
from collections import defaultdict
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
    from onnx import ModelProto
    from onnxruntime import InferenceSession
    from torch import Tensor, nn

    from gcvit_edge.backends import Runner
    from gcvit_edge.model.info import ModelInfo

INTEGER_OPERATORS: frozenset[Operator] = frozenset({"linear", "conv", "attention", "residual"})
PRECISIONS: frozenset[Precision] = frozenset({"int8", "w4a8", "int4", "fp16", "bf16"})
ARTIFACT = "model.{precision}.onnx"
PACKAGES = ("onnxruntime", "onnx", "onnxscript", "torch")

OPSET = 23  # the first with Attention and RMSNormalization
DECOMPOSED = ("reshape", "to.dtype")  # as PyTorch would; without the second there is no translation
_INPUT, _OUTPUT = "image", "logits"


def form(operators: frozenset[Operator]) -> Form:
    """ONNX Runtime has kernels for RMS norm and for whole attention; products in integers need attention written out."""
    return Form(norm="operator", attention="windows" if "attention" in operators else "operator", gains="none")


def arithmetic(operators: frozenset[Operator], x86: X86) -> Arithmetic:
    """Scales found when it runs are fastest and most exact for linears; for convolutions, as the same products, as fast as QDQ and more
    exact (benchmarks/NOTES.md)."""
    return Arithmetic(activations="uint8", linear="dynamic", mlp="dynamic", conv="dynamic", grouped="dynamic_block")


def capture(deployed: "nn.Module", example: "Tensor") -> "ModelProto":
    """Exports with PyTorch's exporter; dynamic linears become what ONNX Runtime fuses into DynamicQuantizeMatMul."""
    import torch

    from gcvit_edge.backends._decompositions import decompose, without_retrace
    from gcvit_edge.backends._fast_translation import fast_translation
    from gcvit_edge.backends._onnx_cleanup import clean_up
    from gcvit_edge.backends._onnx_constants import fold_at_load
    from gcvit_edge.backends._onnx_norms import fuse_norms
    from gcvit_edge.backends._onnx_operators import pack_grouped_weights, translations
    from gcvit_edge.backends._onnx_position_bias import store_tables

    captured = decompose(torch.export.export(deployed, (example,)), DECOMPOSED)
    with torch.no_grad(), without_retrace(), fast_translation():
        program = torch.onnx.export(
            captured, dynamo=True, opset_version=OPSET, input_names=[_INPUT], output_names=[_OUTPUT], verbose=False,
            custom_translation_table=translations(), optimize=False,
        )  # fmt: skip
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    clean_up(program.model)
    fuse_norms(program.model)
    store_tables(program.model)
    model = program.model_proto
    pack_grouped_weights(model)
    fold_at_load(model)
    return model


def save(graph: "ModelProto", path: Path, info: "ModelInfo") -> list[Path]:
    """Writes one .onnx file, with labels and preprocessing in `metadata_props`."""
    import onnx

    for part in (*graph.graph.node, *graph.graph.input, *graph.graph.output):  # where in the source it came from, 4 % of an INT8 file
        del part.metadata_props[:]
    del graph.graph.value_info[:]
    del graph.metadata_props[:]
    properties = {
        "names": json.dumps(dict(enumerate(info.labels.names))),
        "preprocessing": info.preprocessing.model_dump_json(),
        "model": info.name,
        "license": info.origin.licence,
    }
    onnx.helper.set_model_props(graph, properties)
    onnx.save(graph, path)
    return [path]


def import_runtime() -> str:
    import onnxruntime

    return onnxruntime.__name__


def load(path: Path, threads: int) -> "Runner":
    """A CPU session that runs operators one after the other, each on `threads` threads."""
    session = _session(path, threads, None)

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(session.run([_OUTPUT], {_INPUT: image})[0])

    return run


def _session(path: Path, threads: int, profile_prefix: Path | None) -> "InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_prefix)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def requirements(path: Path) -> dict[str, Any]:
    """The opset decides the minimum version: opset 23 came with ONNX Runtime 1.23 (its compatibility table)."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    operators = sorted({f"{node.domain + '.' if node.domain else ''}{node.op_type}" for node in model.graph.node})
    return {"runtime": "onnxruntime", "minimum_version": "1.23.0", "delegates": ["CPUExecutionProvider"], "operators": operators}


_INTEGER = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QGemm", "QLinearMatMul", "QLinearConv", "ConvInteger"}
_KINDS: dict[Kind, set[str]] = {
    "matrix": {*_INTEGER, "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits", "Conv", "FusedConv", "Attention"},
    "quantization": {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"},
    "layout": {
        "Transpose", "Reshape", "ReorderInput", "ReorderOutput", "Unsqueeze", "Squeeze", "Expand", "Concat", "Slice", "Pad", "Gather",
    },
}  # fmt: skip


def profile(path: Path, threads: int, image: NDArray[np.float32], runs: int) -> tuple[list[TimedOperator], int | None]:
    """From ONNX Runtime's own profiler. Source: ONNX Runtime documentation, "Profiling tools"."""
    with tempfile.TemporaryDirectory() as folder:
        session = _session(path, threads, Path(folder) / "profile")
        for _ in range(runs):
            session.run(None, {_INPUT: image})
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event["dur"] / 1000)
    rounding = _rounding_products(path)
    return [
        TimedOperator(name, operator, _kind(operator), float(np.median(values)), operator in _INTEGER or name in rounding)
        for (name, operator), values in times.items()
    ], None


def _rounding_products(path: Path) -> set[str]:
    """Names of the products with INT4 weights that round activations, which the profile does not tell from those in float.

    Source: ONNX Runtime's contributed operator MatMulNBits, `accuracy_level` 4.
    """
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    return {node.name for node in products if any(each.name == "accuracy_level" and each.i == 4 for each in node.attribute)}


def _kind(operator: str) -> Kind:
    for kind, names in _KINDS.items():
        if operator in names:
            return kind
    return "other"
