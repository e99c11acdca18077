"""The few rules that clean up an exported graph leave nothing that all of onnxscript's would find, nor does what its export skips."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from gcvit_edge.backends import _fast_translation, _onnx_cleanup
from gcvit_edge.lower import lower_float, lower_quantized
from gcvit_edge.model.create import describe_model
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.recipe import parse_recipe, recipe_text

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("gcvit_xxtiny", "float"), pytest.param("gcvit_base", "int8_ptq", marks=slow),
        *(pytest.param("gcvit_xxtiny", recipe, marks=slow) for recipe in ("int8_ptq", "int8_ptq_full", "int4_weights", "bf16")),
    ],
)  # fmt: skip
def test_the_same_file_as_by_all_rules(
    name: str, recipe: str, make_model: Callable[..., GCViT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(name, dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), img_size=(64, 96), window_size=None)

    def made(folder: Path) -> onnx.ModelProto:
        if recipe == "float":
            return onnx.load(lower_float("onnx", model, describe_model(model), folder).path)
        parsed = parse_recipe(recipe_text(recipe), recipe)
        images = [np.random.default_rng(0).standard_normal((1, 3, 64, 96)).astype(np.float32)]
        return onnx.load(
            lower_quantized("onnx", calibrate(model, parsed, lambda: iter(images)), describe_model(model), parsed, folder).path
        )

    ours = made(tmp_path / "ours")
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: export(*arguments, **options | {"optimize": True}))
    monkeypatch.setattr(_onnx_cleanup, "clean_up", lambda model: None)
    monkeypatch.setattr(_fast_translation, "fast_translation", nullcontext)
    theirs = made(tmp_path / "theirs")
    assert len(ours.graph.node) > 100
    assert ours == theirs
