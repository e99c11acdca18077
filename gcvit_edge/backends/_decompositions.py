"""Operators of a captured network as an exporter wants them, in one pass over its graph.

Exporters get there by `ExportedProgram.run_decompositions`, which traces the whole network once more: a quarter to half of an export's time
(benchmarks/NOTES.md). Of the deploy form it changes a few operators, to which these rules do the same, node by node
(tests/backends/test_decompositions.py); it has nothing else to do, such as to replace operators that work in place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from operator import getitem
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import Node

Call = Callable[..., "Node"]  # adds an operator with its arguments to the graph


def decompose(program: "ExportedProgram", names: Sequence[str]) -> "ExportedProgram":
    """Changes the graph of `program`, and gives it: these operators (of `RULES`) are those that PyTorch makes of them, and what nothing
    reads is gone."""
    from torch.fx import Graph
    from torch.fx.node import map_arg

    before, after = program.graph, Graph()
    before.eliminate_dead_code()
    after.set_codegen(before._codegen)  # knows the names of inputs
    operators = {_operator(name): RULES[name] for name in names}
    made: dict[Node, Node] = {}

    def emit(place: "Node", target: Any, *args: Any, **kwargs: Any) -> "Node":
        if target in operators:
            return operators[target](partial(emit, place), *args, **kwargs)
        name = getattr(target, "overloadpacket", target).__name__
        new = after.create_node("call_function", target, args, kwargs, after._target_to_str(name))
        inputs, options = map_arg((args, kwargs), lambda each: each.meta["val"])
        new.meta = {**place.meta, "val": place.meta["val"] if target == place.target else target(*inputs, **options)}
        return new

    for node in before.nodes:
        if node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
            made[node] = emit(node, node.target, *args, **kwargs)
        else:
            made[node] = after.node_copy(node, made.__getitem__)
    names_after = {node.name: new.name for node, new in made.items()}
    for output in program.graph_signature.output_specs:
        output.arg.name = names_after[output.arg.name]
    program.graph_module.graph = after
    return program


@contextmanager
def without_retrace() -> Iterator[None]:
    """Inside, `run_decompositions` gives a program that has nothing to decompose as it is."""
    from torch.export import ExportedProgram

    retrace = ExportedProgram.run_decompositions

    def run_decompositions(self: ExportedProgram, table: Any = None, **kwargs: Any) -> ExportedProgram:
        if table is None or any(node.target in table for node in self.graph.nodes if node.op == "call_function"):
            return retrace(self, table, **kwargs)
        return self

    with patch.object(ExportedProgram, "run_decompositions", run_decompositions):
        yield


def _operator(name: str) -> Any:
    """`softmax.int`: the operator of ATen."""
    from torch import ops

    packet, _, overload = name.partition(".")
    return getattr(getattr(ops.aten, packet), overload or "default")


def _conv2d(
    call: Call, x: "Node", weight: "Node", bias: "Node | None" = None, stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1), groups: int = 1,
) -> "Node":  # fmt: skip
    options = [list(stride), list(padding), list(dilation), False, [0, 0], groups]
    return call(_operator("convolution"), x, weight, bias, *options)


def _max_pool2d(call: Call, x: "Node", *window: Any) -> "Node":
    return call(getitem, call(_operator("max_pool2d_with_indices"), x, *window), 0)


def _softmax(call: Call, x: "Node", dim: int) -> "Node":
    return call(_operator("_softmax"), x, dim, False)


def _to(call: Call, x: "Node", dtype: "torch.dtype") -> "Node":
    return x if x.meta["val"].dtype == dtype else call(_operator("_to_copy"), x, dtype=dtype)


def _reshape(call: Call, x: "Node", shape: Sequence[int]) -> "Node":
    """A view where strides allow it, else of a copy. -1 stays as it is for what is contiguous alone."""
    import torch

    value: torch.Tensor = x.meta["val"]
    if value.is_contiguous():
        return call(_operator("view"), x, shape)
    sizes = [size if size >= 0 else -value.numel() // prod(shape) for size in shape]
    try:
        value.view(sizes)
    except (RuntimeError, ValueError):
        copy = call(_operator("clone"), x, memory_format=torch.contiguous_format)
        return call(_operator("_unsafe_view"), copy, sizes)
    return call(_operator("view"), x, sizes)


def _unsafe_view(call: Call, x: "Node", shape: Sequence[int]) -> "Node":
    return call(_operator("view"), x, shape)


def _matmul(call: Call, a: "Node", b: "Node") -> "Node":
    """Of as many axes, by a product of three."""
    left, right = (list(each.meta["val"].shape) for each in (a, b))
    *batch, rows, _ = left
    flat = []
    for factor, (*_, height, width) in ((a, left), (b, right)):
        expanded = call(_operator("expand"), factor, [*batch, height, width])
        flat.append(call(_operator("reshape"), expanded, [prod(batch), height, width]))
    return call(_operator("view"), call(_operator("bmm"), *flat), [*batch, rows, right[-1]])


RULES: dict[str, Callable[..., "Node"]] = {
    "conv2d": _conv2d,
    "matmul": _matmul,
    "max_pool2d": _max_pool2d,
    "reshape": _reshape,
    "softmax.int": _softmax,
    "to.dtype": _to,
    "_unsafe_view": _unsafe_view,
}
