"""Translation to ONNX without what finds nothing to do, with the same file to the byte (tests/backends/test_onnx_cleanup.py).

- For each of 500 translations that are not used the source is parsed anew, to learn the domain of its operators.
- The graph is run to find operators on two types of numbers, of which the deploy form has none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def fast_translation() -> Iterator[None]:
    """Inside, `torch.onnx.export` of a deploy form is faster."""
    from onnxscript import TracedOnnxFunction
    from torch.onnx._internal.exporter import _fx_passes

    def opset(self: TracedOnnxFunction) -> Any:
        return self.opset  # has the domain too

    def nothing(graph_module: Any) -> None:
        pass

    with (
        patch.object(TracedOnnxFunction, "function_ir", property(opset)),
        patch.object(_fx_passes, "insert_type_promotion_nodes", nothing),
    ):
        yield
