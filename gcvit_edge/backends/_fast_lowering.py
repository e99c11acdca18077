"""ExecuTorch's lowering to XNNPACK in less time, with the same file to the byte (tests/backends/test_executorch.py).

Lowering retraces the whole graph some 60 times. Measured on the INT8 graph of XXT, seconds of CPU:

- 12 of 55 went into copying every node's provenance at every retrace, which grows with each pass and only serves debuggers;
  the records are shared instead.
- 14 of 48 went into passes that look for operators that GC ViT does not have.
- A fifth of what was left (of XXT's float graph, 13.6 to 10.7) went into writing every graph as Python code and compiling it; passes
  walk graphs, and of 163 in a small network 2 are called.
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
    from torch.fx import GraphModule
    from torch.fx.traceback import NodeSource

    compile_now = GraphModule.recompile

    class BusyPasses(xnnpack_preprocess.XNNPACKPassManager):
        def __init__(self, exported_program: Any, passes: Any = None) -> None:
            super().__init__(exported_program, passes)
            self.passes = [each for each in self.passes if each.__name__ not in IDLE_PASSES]

    def share(self: NodeSource, memo: dict[int, Any]) -> NodeSource:
        return self

    def compile_when_called(self: GraphModule) -> None:
        """As torch.fx's own `_LazyGraphModule` does, which only its own tracers make."""

        def forward(module: GraphModule, *args: Any, **kwargs: Any) -> Any:
            compile_now(module)  # which puts the real one in the place of this one
            return module.forward(*args, **kwargs)

        codegen: Any = self.graph._codegen
        if hasattr(codegen, "pytree_info"):
            self._in_spec, self._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
        self._code = ""  # for messages to developers
        type(self).forward = forward  # every GraphModule has a class of its own

    with (
        patch.object(NodeSource, "__deepcopy__", share, create=True),
        patch.object(GraphModule, "recompile", compile_when_called),
        patch.object(xnnpack_preprocess, "XNNPACKPassManager", BusyPasses),
    ):
        yield
