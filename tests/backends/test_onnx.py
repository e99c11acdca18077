import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from gcvit_edge.data import Labels
from gcvit_edge.lower import lower_quantized
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.recipe import parse_recipe, recipe_text

RECIPE = parse_recipe(recipe_text("int8_ptq"), "int8_ptq")
IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((16, 3, 64, 64), np.float32)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    torch.manual_seed(0)
    network = create_model(dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=4, img_size=64)
    info = describe_model(network, Labels.of(["a", "b/c", "d", "e f"]))
    artifact = lower_quantized("onnx", calibrate(network, RECIPE, lambda: iter(IMAGES)), info, RECIPE, tmp_path_factory.mktemp("onnx"))
    return onnx.load(artifact.path)


def attribute(node: onnx.NodeProto, name: str) -> int:
    return next(each.i for each in node.attribute if each.name == name)


def test_structure_of_the_int8_graph(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    produced = {output: node for node in model.graph.node for output in node.output}
    weights = {initializer.name: initializer for initializer in model.graph.initializer}
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["MatMul"] + kinds["Gemm"] == 1 + 2 * 9  # the head and the gates of nine Fused-MBConvs keep exact activations
    assert kinds["Attention"] == 6
    assert kinds["SkipSimplifiedLayerNormalization"] == 6 * 2 + 4 * 2 + 1
    assert kinds["RMSNormalization"] == 0
    linears = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
    assert all(weights[node.input[1]].data_type == onnx.TensorProto.INT8 for node in linears)
    inputs = Counter(produced[node.input[0]].op_type for node in linears)
    # linears of local blocks, of global ones, which have no q, and of the MBConvs; and convolutions as such products
    assert inputs == {"DynamicQuantizeLinear": 4 * 6 + 2 * 5 + 9, "Reshape": 4}
    dense = [node for node in model.graph.node if node.op_type == "Conv" and attribute(node, "group") == 1]
    assert [node.input[0] for node in dense] == ["image"]
    assert kinds["QuantizeLinear"] == 0  # no scale is from calibration
    image_conv = next(node for node in model.graph.node if "image" in node.input)
    assert image_conv.op_type == "Conv"
    biases = [w for name, w in weights.items() if "position_bias" in name and w.dims]
    assert len(biases) == 6
    assert all(bias.data_type == onnx.TensorProto.INT8 for bias in biases)


def test_metadata(model: onnx.ModelProto) -> None:
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["names"]) == {"0": "a", "1": "b/c", "2": "d", "3": "e f"}
    assert json.loads(properties["preprocessing"])["size"] == [64, 64]
    assert "CC-BY-NC-SA-4.0" in properties["license"]
