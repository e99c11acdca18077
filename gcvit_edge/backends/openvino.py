"""OpenVINO: IR (.xml and .bin), quantized by NNCF.

Sources: NNCF 3.4 post-training quantization guide; OpenVINO 2026 model API conventions for `model_info`.
"""

import logging
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.recipe import Operator, Recipe

if TYPE_CHECKING:
    from openvino import Model, Node

    from gcvit_edge.backends import Runner
    from gcvit_edge.model.gcvit import GCViT
    from gcvit_edge.model.info import ModelInfo

# NNCF puts no quantizer on the residual additions of a transformer, ask as one may
INTEGER_OPERATORS: frozenset[Operator] = frozenset({"linear", "conv", "attention"})
ARTIFACT = "openvino/model.{precision}.xml"
RUNTIME = "openvino"
PACKAGES = ("openvino", "nncf", "torch")

_CONVOLUTIONS = {"Convolution", "GroupConvolution"}


def capture(model: "GCViT", info: "ModelInfo") -> "Model":
    """Converts the deploy form. Norms are written out: in INT8 graphs that is faster than OpenVINO's MVN operator."""
    import openvino
    import torch

    from gcvit_edge.model.deploy import Form, deploy

    example = torch.zeros(1, model.config.in_chans, *model.config.img_size)
    graph = openvino.convert_model(torch.export.export(deploy(model, Form(norm="rms")), (example,)))
    graph.inputs[0].set_names({"image"})
    graph.outputs[0].set_names({"logits"})
    return graph


def quantize(graph: "Model", recipe: Recipe, images: Iterable[NDArray[np.float32]]) -> "Model":
    """NNCF post-training quantization of the recipe's operators; position biases are stored as INT8."""
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.ERROR)
    samples = list(images)
    advanced = nncf.AdvancedQuantizationParameters(
        # smoothing can hurt window attention (NNCF's own figures for Swin-B: -1.7 points)
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
        # the default clips to the mean of the images' extremes: 27 dB instead of 34 on photographs
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        # made no difference in our favour: 33.6 dB with it, 34.2 without
        disable_bias_correction=True,
    )
    quantized = nncf.quantize(
        graph,
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=[op.get_friendly_name() for op in graph.get_ops() if _stays_float(op, recipe)]),
        advanced_parameters=advanced,
    )
    _store_position_bias_as_int8(quantized)
    return quantized


def _stays_float(op: "Node", recipe: Recipe) -> bool:
    """Whether NNCF must leave an operator alone, by what the recipe wants in integers."""
    kind = op.get_type_name()
    if kind in _CONVOLUTIONS:
        reads_image = op.input_value(0).get_node().get_type_name() == "Parameter"
        return "conv" not in recipe.operators or reads_image or _is_average(op)
    if kind == "MatMul":
        return ("linear" not in recipe.operators or _is_average(op)) if _weight(op) is not None else "attention" not in recipe.operators
    return kind not in {"Constant", "Parameter", "Result"}


def _is_average(op: "Node") -> bool:
    """The averages of written-out norms: one output channel gains nothing, and its error would scale the whole stream."""
    weight = _weight(op)
    return weight is not None and weight.shape[0] == 1


def _weight(op: "Node") -> NDArray[Any] | None:
    return _constant(op.input_value(1).get_node())


def _constant(node: "Node") -> NDArray[Any] | None:
    return node.get_data() if node.get_type_name() == "Constant" else None  # type: ignore[attr-defined]


def _store_position_bias_as_int8(graph: "Model") -> None:
    """Replaces each float position bias by INT8 values times a scale, which OpenVINO folds back when it compiles.

    They are 14 % of the float file of XXT, so in float they would be a third of the INT8 one. Their rounding leaves 84 dB.
    """
    from openvino import opset15 as ops

    for op in graph.get_ops():
        data = _constant(op)
        if data is None or data.dtype != np.float32 or data.ndim != 4 or data.shape[2] != data.shape[3] or data.shape[2] < 49:
            continue
        scale = np.float32(np.abs(data).max() / 127)
        values = ops.constant(np.round(data / scale).astype(np.int8))
        restored = ops.multiply(ops.convert(values, "f32"), ops.constant(scale))
        op.output(0).replace(restored.output(0))


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
    path.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(graph, path, compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def load(path: Path, threads: int) -> "Runner":
    """Compiles the IR for the CPU, for latency, in float32 where it is not integer."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return request.infer([image])[0].copy()

    return run


def requirements(path: Path) -> dict[str, Any]:
    """IR is read by the OpenVINO that wrote it and later ones; the operators are those of the graph."""
    import openvino

    operators = sorted({op.get_type_name() for op in openvino.Core().read_model(path).get_ops()})
    return {"runtime": "openvino", "minimum_version": version("openvino"), "delegates": [], "operators": operators}
