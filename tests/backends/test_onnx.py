import json
from pathlib import Path

import numpy as np
import onnx
import torch

from gcvit_edge.backends import onnx as backend
from gcvit_edge.data import Labels
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.recipe import parse_recipe, recipe_text

RECIPE = parse_recipe(recipe_text("int8_ptq"), "int8_ptq")
IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((16, 3, 64, 64), np.float32)]


def quantized(tmp_path: Path) -> onnx.ModelProto:
    torch.manual_seed(0)
    model = create_model(dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=4, img_size=64)
    info = describe_model(model, Labels.of(["a", "b/c", "d", "e f"]))
    backend.save(backend.quantize(backend.capture(model, info), RECIPE, IMAGES), tmp_path / "model.onnx", info)
    return onnx.load(tmp_path / "model.onnx")


def test_structure_of_the_int8_graph(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    onnx.checker.check_model(model, full_check=True)
    produced = {output: node for node in model.graph.node for output in node.output}
    weights = {initializer.name: initializer for initializer in model.graph.initializer}
    for node in model.graph.node:
        assert len(node.output) == 1
        if node.op_type == "Gemm" or (node.op_type == "Conv" and "image" not in node.input):
            data, weight = (produced[name] for name in node.input[:2])
            assert data.op_type == weight.op_type == "DequantizeLinear"
            assert weights[weight.input[0]].data_type == onnx.TensorProto.INT8
            scales = weights[weight.input[1]]
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            channels = weights[weight.input[0]].dims[0 if node.op_type == "Conv" or transposed else 1]
            assert list(scales.dims) == [channels]  # per output channel
    image_conv = next(node for node in model.graph.node if "image" in node.input)
    assert image_conv.op_type == "Conv"
    biases = [name for name in weights if "position_bias" in name and name.endswith("_int8")]
    assert len(biases) == 6
    assert not any("position_bias" in name and w.data_type == onnx.TensorProto.FLOAT and w.dims for name, w in weights.items())


def test_metadata(tmp_path: Path) -> None:
    properties = {entry.key: entry.value for entry in quantized(tmp_path).metadata_props}
    assert json.loads(properties["names"]) == {"0": "a", "1": "b/c", "2": "d", "3": "e f"}
    assert json.loads(properties["preprocessing"])["size"] == [64, 64]
    assert properties["Image.BitmapPixelFormat"] == "Rgb8"
    assert "CC-BY-NC-SA-4.0" in properties["license"]
