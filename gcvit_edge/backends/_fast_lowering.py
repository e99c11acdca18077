"""ExecuTorch's lowering to XNNPACK without what finds nothing to do, with the same file to the byte (tests/backends/test_executorch.py).

- It traces the whole graph again for every pass, some 60 times. Most of them look for operators that GC ViT does not have, and two only
  give operators other names.
- Whether an operator is a weight it looks up in a table of all weights that it makes anew for each question.
- How large the answer of the delegate is it learns by running the network that was lowered.
- What types a record's fields have it reads from their source, for each record that it writes.

What each takes is in benchmarks/NOTES.md.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

if TYPE_CHECKING:
    from torch.export import ExportGraphSignature

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
WEIGHT_TABLES = ("inputs_to_parameters", "inputs_to_buffers", "inputs_to_lifted_tensor_constants", "non_persistent_buffers")


@contextmanager
def fast_lowering() -> Iterator[None]:
    """Inside, `to_edge_transform_and_lower` of a deploy form, and `to_executorch` of what it gives, do without.

    The first has to be told not to check operators on the way (`_check_ir_validity=False`): some that it would convert there and back stay
    what they are.
    """
    import torch
    from executorch.exir._serialize import _dataclass as records
    from executorch.exir.passes.replace_aten_with_edge_pass import aten_to_edge, should_lower_to_edge
    from torch._export.passes.replace_view_ops_with_view_copy_ops_pass import get_view_copy_of_view_op
    from torch._ops import OpOverload
    from torch.export import ExportGraphSignature
    from torch.fx import GraphModule
    from torch.fx.passes.infra.pass_base import PassBase, PassResult

    delegates = import_module("torch._higher_order_ops.executorch_call_delegate")  # whose package has the operator by this name
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

    def empty_outputs(lowered: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
        values = [output.meta["val"] for output in lowered.original_module.graph.output_node().args[0]]
        return [torch.empty(value.shape, dtype=value.dtype) for value in values]

    with ExitStack() as stack:
        stack.enter_context(patch.object(PassBase, "__call__", run_briefly))
        stack.enter_context(patch.object(delegates, "call_delegate_cpu", empty_outputs))
        stack.enter_context(patch.object(records, "get_type_hints", cache(records.get_type_hints)))
        for table in WEIGHT_TABLES:
            stack.enter_context(patch.object(ExportGraphSignature, table, _made_once(getattr(ExportGraphSignature, table))))
        yield


def _made_once(table: property) -> property:
    """For as long as a signature has the same inputs."""
    get = cast(Callable[..., Any], table.fget)
    made: dict[int, tuple[ExportGraphSignature, list[Any], Any]] = {}  # by `id`, no other's while one is kept here: they have no hash

    def made_once(signature: "ExportGraphSignature") -> Any:
        inputs = [(spec.arg.name, spec.target) for spec in signature.input_specs]  # which exporters change in place
        if id(signature) not in made or made[id(signature)][1] != inputs:
            made[id(signature)] = signature, inputs, get(signature)
        return made[id(signature)][2]

    return property(made_once)
