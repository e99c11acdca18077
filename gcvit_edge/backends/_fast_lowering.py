"""ExecuTorch's lowering to XNNPACK in a third of its time, with the same file to the byte (tests/backends/test_executorch.py).

Lowering retraces the whole graph some 60 times. Measured on the INT8 graph of XXT, seconds of CPU:

- 12 of 55 went into copying every node's provenance at every retrace, which grows with each pass and only serves debuggers;
  the records are shared instead.
- 14 of 48 went into passes that look for operators that GC ViT does not have.
- A fifth of what was left (of XXT's float graph, 13.6 to 10.7) went into writing every graph as Python code and compiling it; passes
  walk graphs, and of 163 in a small network 2 are called.
- Of 40 that it then took on another CPU (AMD EPYC, Zen 3; 70 as ExecuTorch comes) 15 went into more such passes, which retrace a graph that
  stays as it is, and into a decomposition of operators that are gone by then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

# for operators that the deploy form does not have; the first seven on the way to ExecuTorch's dialect, the others to XNNPACK
IDLE_PASSES = {
    "ConstPropPass",
    "DimOrderOpsRevertPass",  # of what MemoryFormatOpsPass did
    "MemoryFormatOpsPass",
    "NormalizeTransposePass",
    "RemoveMixedTypeOperators",
    "ReplaceBrokenOpsWithFunctionalOpsPass",
    "SymToTensorPass",
    "Conv1dUnsqueezePass",
    "ConvertToLinearPass",
    "ConvertToSDPAPass",
    "ConvertToUpsampleBilinear2d",
    "DecomposeBatchNorm",
    "DecomposeConcatenate",
    "FuseActivationPass",
    "FuseBatchNormPass",
    "InsertPadQDQPass",
    "LegalizePortableDimOrderPass",
    "PReLUReshapePass",
    "PropagateCustomMetaPass",
    "RemoveGetItemPass",
    "RemoveRedundantCopyPass",
}


@contextmanager
def fast_lowering() -> Iterator[None]:
    """Inside, `to_edge_transform_and_lower` of a deploy form takes a third of its time, if it is told not to check operators on the way
    (`_check_ir_validity=False`): some that it would convert there and back stay what they are."""
    from torch.export import ExportedProgram
    from torch.fx import GraphModule
    from torch.fx.passes.infra.pass_base import PassBase, PassResult
    from torch.fx.traceback import NodeSource

    compile_now, decompose, run_pass = GraphModule.recompile, ExportedProgram.run_decompositions, PassBase.__call__

    def share(self: NodeSource, memo: dict[int, Any]) -> NodeSource:
        return self

    def run_unless_idle(self: PassBase, graph_module: GraphModule) -> PassResult | None:
        return PassResult(graph_module, False) if type(self).__name__ in IDLE_PASSES else run_pass(self, graph_module)

    def decompose_if_there_is_something(self: ExportedProgram, table: Any = None, **kwargs: Any) -> ExportedProgram:
        """An empty table is not for nothing: with it a program is made functional."""
        there = any(node.op == "call_function" and node.target in table for node in self.graph.nodes) if table else True
        return decompose(self, table, **kwargs) if there else self

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
        patch.object(PassBase, "__call__", run_unless_idle),
        patch.object(ExportedProgram, "run_decompositions", decompose_if_there_is_something),
    ):
        yield
