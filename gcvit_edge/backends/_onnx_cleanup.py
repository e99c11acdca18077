"""What PyTorch's exporter lets onnxscript do to a graph that it has made, in less time.

onnxscript (`optimizer/_optimizer.py`) tries 46 rules on every node, up to twice, which is most of its time. Four of them find something in
what our networks export to; with these alone files are the same to the byte.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx_ir import Model


def clean_up(model: "Model") -> None:
    """Folds constants and shapes, merges what follows itself, shares equal constants and computations; in place. model: as exported with
    `optimize=False`."""
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules import common as rules

    chosen = [
        rules.reshape_reshape_rule, rules.transpose_transpose_rule, rules.remove_optional_bias_from_conv_rule,
        rules.remove_optional_bias_from_gemm_rule,
    ]  # fmt: skip
    passes.InlinePass()(model)
    for _ in range(2):  # constants may follow from what was rewritten
        fold_constants(model, onnx_shape_inference=True)
        rewrite(model, chosen)
    for each in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        each(model)
