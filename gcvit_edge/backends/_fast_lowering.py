"""ExecuTorch's lowering to XNNPACK without what finds nothing to do, with the same file to the byte (tests/backends/test_executorch.py).

Lowering traces the whole graph again for every pass, some 60 times. Most of them look for operators that GC ViT does not have, and two
only give operators other names. Of XXT's INT8 graph, with `fast_export`, it is a third of the time that ExecuTorch takes
(benchmarks/NOTES.md).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

# for operators that the deploy form does not have; the first seven on the way to ExecuTorch's dialect, the others to XNNPACK or behind it
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
    """Inside, `to_edge_transform_and_lower` of a deploy form, and `to_executorch` of what it gives, skip these, and rename operators
    without a trace. It has to be told not to check operators on the way (`_check_ir_validity=False`): some that it would convert there and
    back stay what they are."""
    from executorch.exir.passes.replace_aten_with_edge_pass import aten_to_edge, should_lower_to_edge
    from torch._export.passes.replace_view_ops_with_view_copy_ops_pass import get_view_copy_of_view_op
    from torch._ops import OpOverload
    from torch.fx import GraphModule
    from torch.fx.passes.infra.pass_base import PassBase, PassResult

    renames: dict[str, Callable[[OpOverload], Any]] = {
        # strides are those of copies after the next pass, which traces
        "ReplaceViewOpsWithViewCopyOpsPass": lambda op: get_view_copy_of_view_op(op._schema) or op,
        "OpReplacePass": lambda op: aten_to_edge(op) if should_lower_to_edge(op) else op,
    }
    run_pass = PassBase.__call__

    def run_briefly(self: PassBase, graph_module: GraphModule) -> PassResult | None:
        name = type(self).__name__
        if name in renames:
            for node in graph_module.graph.nodes:
                if isinstance(node.target, OpOverload):
                    node.target = renames[name](node.target)
            graph_module.recompile()
            return PassResult(graph_module, True)
        return PassResult(graph_module, False) if name in IDLE_PASSES else run_pass(self, graph_module)

    with patch.object(PassBase, "__call__", run_briefly):
        yield
