"""Making ExecuTorch's lowering to XNNPACK nearly twice as fast, with the same file to the byte (tests/backends/test_executorch.py).

Lowering retraces the whole graph some 60 times. Measured on the INT8 graph of XXT, seconds of CPU:

- 12 of 55 went into copying every node's provenance at every retrace, which grows with each pass and only serves debuggers;
  the records are shared instead.
- 14 of 48 went into passes that look for operators that GC ViT does not have.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

# passes of XNNPACKPassManager for operators that the deploy form does not have
IDLE_PASSES = {
    "Conv1dUnsqueezePass",
    "ConvertToSDPAPass",
    "ConvertToUpsampleBilinear2d",
    "DecomposeBatchNorm",
    "DecomposeConcatenate",
    "FuseBatchNormPass",
    "InsertPadQDQPass",
    "PReLUReshapePass",
    "PropagateCustomMetaPass",
}


@contextmanager
def fast_lowering() -> Iterator[None]:
    """Inside, `to_edge_transform_and_lower` of a deploy form takes little more than half its time."""
    from executorch.backends.xnnpack import xnnpack_preprocess
    from torch.fx.traceback import NodeSource

    class BusyPasses(xnnpack_preprocess.XNNPACKPassManager):
        def __init__(self, exported_program: Any, passes: Any = None) -> None:
            super().__init__(exported_program, passes)
            self.passes = [each for each in self.passes if each.__name__ not in IDLE_PASSES]

    def share(self: NodeSource, memo: dict[int, Any]) -> NodeSource:
        return self

    with (
        patch.object(NodeSource, "__deepcopy__", share, create=True),
        patch.object(xnnpack_preprocess, "XNNPACKPassManager", BusyPasses),
    ):
        yield
