from pathlib import Path

import numpy as np
import openvino
import pytest
import torch

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import openvino as backend
from gcvit_edge.data import Labels
from gcvit_edge.lower import lower_quantized, simulate
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.calibrate import Calibrated, calibrate
from gcvit_edge.recipe import parse_recipe, recipe_text

RECIPE = parse_recipe(recipe_text("int8_ptq"), "int8_ptq")
AVX2 = parse_recipe(recipe_text("int8_ptq_avx2"), "int8_ptq_avx2")
IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((16, 3, 64, 64), np.float32)]


@pytest.fixture(scope="module")
def model() -> GCViT:
    torch.manual_seed(0)
    return create_model(dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=4, img_size=64)


@pytest.fixture(scope="module")
def calibrated(model: GCViT) -> Calibrated:
    return calibrate(model, RECIPE, lambda: iter(IMAGES))


@pytest.fixture(scope="module")
def artifact(model: GCViT, calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    info = describe_model(model, Labels.of(["a", "b/c", "d", "e f"]))
    return lower_quantized("openvino", calibrated, info, RECIPE, tmp_path_factory.mktemp("openvino"))


def is_integer_weight(node: openvino.Node) -> bool:
    """An INT8 constant, converted and scaled."""
    if node.get_type_name() not in ("Multiply", "Convert", "Reshape"):
        return node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8
    return is_integer_weight(node.input_value(0).get_node())


def test_structure_of_the_int8_graph(artifact: Artifact) -> None:
    model = openvino.Core().read_model(artifact.path)
    operators = model.get_ordered_ops()
    depends_on_image: set[str] = {op.get_friendly_name() for op in model.get_parameters()}
    for op in operators:  # the weights of depthwise convolutions have rank 5 in OpenVINO; what is computed must not
        if depends_on_image & {source.get_node().get_friendly_name() for source in op.input_values()}:
            depends_on_image.add(op.get_friendly_name())
            assert all(len(output.get_partial_shape()) <= 4 for output in op.outputs()), op.get_friendly_name()
    assert len(depends_on_image) > 100
    assert not any(op.get_output_partial_shape(0).is_dynamic for op in operators if op.get_output_size())
    heavy = [op for op in operators if op.get_type_name() in ("Convolution", "MatMul")]
    integer = [op for op in heavy if is_integer_weight(op.input_value(1).get_node())]
    rounded = [op for op in integer if op.input_value(0).get_node().get_type_name() in ("FakeQuantize", "Reshape", "Transpose")]
    assert len(integer) - len(rounded) == 9  # the second linears of nine gates; the first, and the head, read reshaped means
    products = sum(op.get_type_name() == "MatMul" for op in operators) - sum(op.get_type_name() == "MatMul" for op in integer)
    assert products == 2 * 6  # the attention products of six blocks are all that stays float
    assert [op for op in operators if op.get_type_name() == "Convolution" and op not in integer] == [
        op for op in operators if op.get_type_name() == "Convolution" and op.input_value(0).get_node().get_type_name() == "Parameter"
    ]
    constants = [op for op in operators if op.get_type_name() == "Constant"]
    biases = [c for c in constants if len(c.shape) == 4 and c.shape[2] == c.shape[3] in (2 * 2, 4 * 4)]  # the tokens of a window
    assert len(biases) == 6
    assert all(bias.get_element_type() == openvino.Type.i8 for bias in biases)


def rounded_products(path: Path, kind: str) -> list[openvino.Node]:
    """Operators of this type whose weights are INT8 and whose activations are rounded, as an integer kernel wants them."""

    def is_rounded(node: openvino.Node) -> bool:
        name = node.get_type_name()
        return name == "FakeQuantize" or (name in ("Reshape", "Transpose") and is_rounded(node.input_value(0).get_node()))

    operators = [op for op in openvino.Core().read_model(path).get_ordered_ops() if op.get_type_name() == kind]
    return [op for op in operators if is_integer_weight(op.input_value(1).get_node()) and is_rounded(op.input_value(0).get_node())]


def test_linears_as_convolutions(model: GCViT, calibrated: Calibrated, artifact: Artifact, tmp_path: Path) -> None:
    """For CPUs without VNNI: every product in integers is a convolution, and computes what the linear does."""
    convolutions = lower_quantized("openvino", calibrated, describe_model(model), AVX2, tmp_path)
    linears, dense = (len(rounded_products(artifact.path, kind)) for kind in ("MatMul", "Convolution"))
    assert linears > 20
    assert not rounded_products(convolutions.path, "MatMul")
    assert len(rounded_products(convolutions.path, "Convolution")) == linears + dense
    image = IMAGES[0]
    with torch.no_grad():
        simulated = simulate("openvino", calibrated, AVX2)(torch.from_numpy(image)).numpy()
    assert sqnr_db(backend.load(convolutions.path, 1)(image), simulated) > 30
    assert sqnr_db(backend.load(artifact.path, 1)(image), simulated) > 30


def test_model_info(artifact: Artifact) -> None:
    model = openvino.Core().read_model(artifact.path)
    assert model.get_rt_info(["model_info", "labels"]).astype(str).split() == ["a", "b/c", "d", "e_f"]
    assert model.get_rt_info(["model_info", "model_type"]).astype(str) == "Classification"
    means = [float(value) for value in model.get_rt_info(["model_info", "mean_values"]).astype(str).split()]
    np.testing.assert_allclose(means, [123.675, 116.28, 103.53])


def test_a_single_thread_is_not_pinned(artifact: Artifact) -> None:
    """Two processes with a thread each would be pinned to the same CPU, and evaluation takes twice as long."""
    assert not backend._compile(artifact.path, 1, {}).get_property("ENABLE_CPU_PINNING")
