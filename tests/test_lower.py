"""Lowering leaves the interpreter as it was."""

import gc
from pathlib import Path

import pytest

from gcvit_edge.lower import lower_float
from gcvit_edge.model.create import describe_model
from gcvit_edge.model.gcvit import GCViT


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_collected_as_before_after_an_export_that_fails(
    collecting: bool, tiny_model: GCViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = []

    def capture(*_: object) -> None:
        inside.append(gc.isenabled())
        raise ZeroDivisionError

    monkeypatch.setattr("gcvit_edge.backends.onnx.capture", capture)
    try:
        if not collecting:
            gc.disable()
        with pytest.raises(ZeroDivisionError):
            lower_float("onnx", tiny_model, describe_model(tiny_model), tmp_path)
        assert gc.isenabled() is collecting
    finally:
        gc.enable()
    assert inside == [False]
