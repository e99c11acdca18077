"""What the rules make of a captured network is what PyTorch's decompositions do, and exporters find nothing more to decompose."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from gcvit_edge.backends import _decompositions, load_backend
from gcvit_edge.lower import lower_float, lower_quantized
from gcvit_edge.model.create import describe_model
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.recipe import parse_recipe, recipe_text

CASES = [
    *((backend, "float") for backend in ("onnx", "openvino", "executorch")),
    *(
        pytest.param(backend, recipe, marks=pytest.mark.slow)
        for backend, recipes in {
            "onnx": ("int8_ptq_full", "int4_weights", "bf16"),
            "openvino": ("int8_ptq_full", "int8_ptq_avx2", "int4_weights", "fp16"),
            "executorch": ("int8_ptq", "int8_ptq_full", "w4a8_ptq"),
        }.items()
        for recipe in recipes
    ),
]


def nodes(program: ExportedProgram) -> list[str]:
    """All of the graph but the order of its weights, and PyTorch's checks of types, which exporters drop."""
    numbers: dict[str, str] = {}
    found = []
    for node in program.graph.nodes:
        if "_assert_tensor_metadata" in node.name:
            continue
        if node.op == "call_function":
            numbers[node.name] = f"node {len(numbers)}"
        values = node.meta.get("val", ())
        values = [each for each in (values if isinstance(values, tuple | list) else [values]) if isinstance(each, torch.Tensor)]
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: numbers.get(each.name, each.name))
        found.append(repr((node.op, str(node.target), args, [(value.shape, value.stride(), value.dtype) for value in values])))
    weights = [node for node in found if node.startswith("('placeholder'")]
    outputs = [numbers[name] for name in program.graph_signature.user_outputs]
    return [*sorted(weights), *(node for node in found if node not in weights), *outputs]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_they_give_what_a_retrace_gives(
    name: str, recipe: str, make_model: Callable[..., GCViT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(depths=(1, 2, 1, 1), img_size=(64, 96), window_size=None)
    retrace, traced = ExportedProgram.run_decompositions, []

    def make(folder: str) -> Path:
        if recipe == "float":
            return lower_float(name, model, describe_model(model), tmp_path / folder).path
        parsed = parse_recipe(recipe_text(recipe), recipe).model_copy(update={"rounding": "nearest"})
        images = [np.random.default_rng(0).standard_normal((1, 3, 64, 96)).astype(np.float32)]
        calibrated = calibrate(model, parsed, lambda: iter(images))
        return lower_quantized(name, calibrated, describe_model(model), parsed, tmp_path / folder).path

    def compared(self: ExportedProgram, table: Any = None, **options: Any) -> ExportedProgram:
        if not any(node.target in table for node in self.graph.nodes) and name == "executorch":  # which asks three times
            return self
        before = copy.deepcopy(self)
        after = retrace(self, table, **options)
        traced.append((before, copy.deepcopy(after)))
        return after

    with monkeypatch.context() as patch:
        patch.setattr(_decompositions, "decompose", lambda program, names: program)
        patch.setattr(_decompositions, "without_retrace", nullcontext)
        patch.setattr(ExportedProgram, "run_decompositions", compared)
        old = make("traced")
    ((captured, expected),) = traced
    assert "reshape" in {node.name for node in captured.graph.nodes}
    assert nodes(_decompositions.decompose(captured, load_backend(name).DECOMPOSED)) == nodes(expected)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *_, **__: pytest.fail("traced again"))
    new = make("rewritten")
    image = np.random.default_rng(1).standard_normal((1, 3, 64, 96)).astype(np.float32)
    np.testing.assert_array_equal(*(load_backend(name).load(file, 1)(image) for file in (old, new)))
