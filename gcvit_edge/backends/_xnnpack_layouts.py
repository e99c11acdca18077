"""A pass of the lowering to XNNPACK: between tokens and feature maps nothing is moved.

XNNPACK's convolutions want channels last. ExecuTorch's pass for that puts a transpose before and after them, also where the graph has one
already, since tokens (H * W, C) are a feature map with its channels last: two transposes in a row that undo each other, each a pass over
the whole tensor. Here both go, and what is left is a change of shape.

    tokens -> view (1, H, W, C) -> permute -> to channels last -> convolution      the convolution reads a view of the tokens
    convolution -> permute -> to contiguous -> view (H * W, C) -> tokens           the tokens are a view of what the convolution wrote

The same goes for the gates of squeeze and excitation, (1, C, 1, 1), whose layouts are one. In XXT 114 transposes become 55: one of the
image, the others of attention. The answers are the same to the bit (tests/backends/test_executorch.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes.channels_last_tagged_reshape_pass import ChannelsLastTaggedReshapePass
from executorch.backends.xnnpack._passes.xnnpack_pass import XNNPACKPass
from executorch.exir.dialects._ops import ops
from executorch.exir.pass_base import PassResult
from torch.fx import GraphModule, Node

_ATEN: Any = ops.edge.aten
_COPY, _PERMUTE, _VIEW = _ATEN._to_copy.default, _ATEN.permute_copy.default, _ATEN.view_copy.default


@contextmanager
def folded_layouts() -> Iterator[None]:
    """Inside, `to_edge_transform_and_lower` ends with this pass."""

    class Passes(xnnpack_preprocess.XNNPACKPassManager):
        def __init__(self, exported_program: Any, passes: Any = None) -> None:
            super().__init__(exported_program, passes)
            self.passes = [*self.passes, FoldLayoutChanges]

    with patch.object(xnnpack_preprocess, "XNNPACKPassManager", Passes):
        yield


class FoldLayoutChanges(XNNPACKPass):
    """After `ChannelsLastTaggedReshapePass`, on whose marks of what has its channels last it relies."""

    def call(self, graph_module: GraphModule) -> PassResult:
        graph = graph_module.graph
        for copy in graph.find_nodes(op="call_function", target=_COPY):
            source = _unmoved(copy)
            if source is None:
                continue
            if copy.kwargs["memory_format"] == torch.channels_last:
                with graph.inserting_before(copy):
                    view = graph.call_function(_VIEW, (source, list(copy.meta["val"].shape)))
                view.meta = dict(copy.meta)
                copy.replace_all_uses_with(view)
            else:
                for user in list(copy.users):
                    if user.target == _VIEW:
                        user.replace_input_with(copy, source)
        graph.eliminate_dead_code()
        graph_module.recompile()
        return PassResult(graph_module, True)


def _unmoved(copy: Node) -> Node | None:
    """What lies in memory as `copy`, a change of layout, has it; None if nothing before it does."""
    before = copy.args[0]
    assert isinstance(before, Node)
    if before.target == _PERMUTE:
        source, order = before.args
        assert isinstance(source, Node)
        assert isinstance(order, list)
        last = copy.kwargs["memory_format"] == torch.channels_last
        undone = [0, 3, 1, 2] if last else [0, 2, 3, 1]
        return source if order == undone and ChannelsLastTaggedReshapePass.is_nhwc_node(source) != last else None
    _, channels, height, width = copy.meta["val"].shape
    return before if channels == 1 or height == width == 1 else None
