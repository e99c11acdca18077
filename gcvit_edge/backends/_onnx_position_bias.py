"""Position biases stored as they were learned: a value for each relative position, looked up when ONNX Runtime loads a model.

Expanded to all pairs of positions they are 14 % of the float file of GC ViT-XXT at 224 px, and half of it at 384 px. Operators on
constants are folded at load, so an inference has no more to do; and the values are the same to the bit.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx_ir import Graph, Model, Value

Window = tuple[int, int]
_SMALLEST = 4  # positions of a window
_ELEMENTWISE = ("Cast", "DequantizeLinear")  # what a bias of fewer bits goes through, and a table as well


def store_tables(model: "Model") -> None:
    """Replaces constants (1, heads, N, N) that depend on relative positions alone by Gather from (1, heads, positions), in place."""
    graph = model.graph
    indices: dict[Window, Value] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or not _is_square(tensor.shape.numpy()):
            continue
        bias = tensor.numpy()
        window = window_of(bias)
        if window is not None and len(value.uses()) == 1:
            if window not in indices:
                indices[window] = _index(graph, window)
            _look_up(graph, value, table_of(bias, window), indices[window])


def _is_square(shape: Sequence[int]) -> bool:
    """Whether it is (1, heads, N, N), with enough positions for a table to be smaller."""
    return len(shape) == 4 and shape[0] == 1 and shape[2] == shape[3] >= _SMALLEST


def window_of(bias: NDArray[np.generic]) -> Window | None:
    """(height, width) of the window for which (1, heads, N, N) is a function of relative positions; None if there is none."""
    count = bias.shape[-1]
    for height in range(1, count + 1):
        window = (height, count // height)
        if count % height == 0 and np.array_equal(table_of(bias, window)[..., index_of(window)], bias):
            return window
    return None


def index_of(window: Window) -> NDArray[np.int32]:
    """(N, N): place in a table of the position of one pixel of a window relative to another."""
    left, right = _positions(window)
    return left - right


def table_of(bias: NDArray[np.generic], window: Window) -> NDArray[np.generic]:
    """(1, heads, N, N) to (1, heads, (2 height - 1) (2 width - 1)); where values disagree, one of them."""
    height, width = window
    table = np.zeros((*bias.shape[:2], (2 * height - 1) * (2 * width - 1)), bias.dtype)
    table[..., index_of(window)] = bias
    return table


def _positions(window: Window) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(N, 1) and (1, N), whose difference is the index."""
    height, width = window
    places = (np.arange(height)[:, None] * (2 * width - 1) + np.arange(width)).reshape(-1, 1).astype(np.int32)
    return places + places[-1, 0], places.T


def _index(graph: "Graph", window: Window) -> "Value":
    """The index of a window, computed at the start of the graph."""
    import onnx_ir as ir

    name = f"relative_positions_{window[0]}x{window[1]}"
    left, right = (
        ir.Value(name=f"{name}.{i}", const_value=ir.tensor(each, name=f"{name}.{i}")) for i, each in enumerate(_positions(window))
    )
    for each in (left, right):
        graph.register_initializer(each)
    difference = ir.node("Sub", [left, right], name=name)
    graph.insert_before(graph[0], difference)
    return difference.outputs[0]


def _look_up(graph: "Graph", value: "Value", table: NDArray[np.generic], index: "Value") -> None:
    """Puts a table and its lookup in the place of `value`, after the operator that makes it float, if there is one."""
    import onnx_ir as ir

    name = f"{value.name}.table"
    source = stored = ir.Value(name=name, const_value=ir.tensor(table, name=name))
    graph.register_initializer(stored)
    ((user, _),) = value.uses()
    expanded = value
    if user.op_type in _ELEMENTWISE:
        user.replace_input_with(0, stored)
        source = expanded = user.outputs[0]
        source.shape = None
    lookup = ir.node("Gather", [source, index], {"axis": 2}, name=f"{name}.lookup")
    ir.convenience.replace_all_uses_with(expanded, lookup.outputs[0])
    lookup.replace_input_with(0, source)
    (graph.insert_before if expanded is value else graph.insert_after)(user, lookup)
    del graph.initializers[str(value.name)]
