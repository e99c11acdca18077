"""Exporters in less of their time, with the same files to the byte (tests/backends/test_contract.py).

- They make millions of short-lived objects, among hundreds of thousands that stay: looking for cycles is a sixth of their time.
- Every operator keeps the lines of code that it came from, and every retrace copies every node's provenance, which grows with each. Both
  only serve debuggers: the lines are not looked up, the records are shared.
- Every graph is written as Python code and compiled; next to none is called.
- Every graph is checked after every pass, which helps who writes passes. What comes out here is run and compared instead.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature
from typing import Any
from unittest.mock import patch

_LOCK = threading.RLock()


@contextmanager
def fast_export() -> Iterator[None]:
    """Inside, capturing and lowering of networks is faster, by whichever exporter of PyTorch's graphs; one thread at a time, since what
    is put aside and back is the whole process's."""
    from torch.export import ExportedProgram
    from torch.fx import Graph, GraphModule, config
    from torch.fx.traceback import NodeSource

    compile_now = GraphModule.recompile

    def share(self: NodeSource, memo: dict[int, Any]) -> NodeSource:
        return self

    def trust(self: Any) -> None:
        pass

    def compile_when_called(self: GraphModule) -> None:
        """As torch.fx's own `_LazyGraphModule` does, which only its own tracers make."""

        def forward(module: GraphModule, *args: Any, **kwargs: Any) -> Any:
            compile_now(module)  # which puts the real one in the place of this one
            return module.forward(*args, **kwargs)

        pytree: Any = getattr(self.graph._codegen, "pytree_info", None)
        if pytree is None:
            names = [node.target for node in self.graph.find_nodes(op="placeholder")]
        else:
            names = [name for name in pytree.orig_args if name != "self"]
            self._in_spec, self._out_spec = pytree.in_spec, pytree.out_spec
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
        forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # which names the inputs of a network
        self._code = ""  # for messages to developers
        type(self).forward = forward  # every GraphModule has a class of its own

    with (
        _LOCK,
        _without_collection(),
        patch.object(config, "do_not_emit_stack_traces", True),
        patch.object(Graph, "lint", trust),
        patch.object(ExportedProgram, "_validate", trust),
        patch.object(NodeSource, "__deepcopy__", share, create=True),
        patch.object(GraphModule, "recompile", compile_when_called),
    ):
        yield


@contextmanager
def _without_collection() -> Iterator[None]:
    """Inside, Python does not look for cycles. Afterwards it looks once, at what was made since."""
    collecting, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    if not frozen:  # else by the program that called us, whose objects are to stay so
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if not frozen:
            gc.unfreeze()
        if collecting:
            gc.enable()
