"""ExecuTorch: .pte for XNNPACK.

The whole network is one XNNPACK delegate call. Sources: ExecuTorch 1.5, "XNNPACK Backend" and its quantization page.
"""

import copy
import tempfile
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.artifact import Precision
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.measurement.operators import Kind, TimedOperator
from gcvit_edge.model.form import Form
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.recipe import X86, Operator

if TYPE_CHECKING:
    from executorch.backends.xnnpack.partition.config.xnnpack_config import XNNPartitionerConfig
    from torch import Tensor, nn
    from torch.export import ExportedProgram

    from gcvit_edge.backends import Runner
    from gcvit_edge.model.info import ModelInfo

INTEGER_OPERATORS: frozenset[Operator] = frozenset({"linear", "conv", "attention", "residual"})
PRECISIONS: frozenset[Precision] = frozenset({"int8", "w4a8"})
ARTIFACT = "model.{precision}.pte"
PACKAGES = ("executorch", "torch", "torchao")

DECOMPOSED = ("conv2d", "reshape", "softmax.int", "to.dtype", "_unsafe_view")  # the rest is preserved, or there are none


def form(operators: frozenset[Operator]) -> Form:
    """XNNPACK has no norms; products of rank 3, because others leave `expand` outside; 1x1 convolutions where feature maps are."""
    gains = "all" if "attention" in operators else "mlp"  # where linears answer in integers: see `arithmetic`
    return Form(norm="products", attention="bmm", pointwise="conv", gains=gains)


def arithmetic(operators: frozenset[Operator], x86: X86) -> Arithmetic:
    """Scales found when it runs, and float outputs, are as fast as static ones but in MLPs, where GELU becomes a table of integers: 4 %
    of the time, of which the last stage has a twentieth, and a fifth of the noise (benchmarks/NOTES.md)."""
    linear = "static" if "attention" in operators else "dynamic_row"  # products of attention want integers
    return Arithmetic(
        activations="int8", linear=linear, mlp="static", last_mlp=linear, conv="dynamic_image", delicate="dynamic_row",
        grouped="dynamic_row", linear_output=True, symmetric_right=True,
    )  # fmt: skip


def capture(deployed: "nn.Module", example: "Tensor") -> "ExportedProgram":
    """Exports for `to_edge_transform_and_lower`."""
    import torch

    from gcvit_edge.backends._decompositions import decompose

    return decompose(torch.export.export(deployed, (example,)), DECOMPOSED)


def save(graph: "ExportedProgram", path: Path, info: "ModelInfo") -> list[Path]:
    """Lowers to XNNPACK and writes the .pte.

    Raises:
        CheckFailed: something was left outside the one delegate call, which would be slow and need portable kernels.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    from gcvit_edge.backends._decompositions import without_retrace
    from gcvit_edge.backends._fast_lowering import fast_lowering
    from gcvit_edge.backends._xnnpack_layouts import folded_layouts

    with without_retrace(), fast_lowering(), folded_layouts():
        config = EdgeCompileConfig(_check_ir_validity=False)  # what is not valid shows below, and when the file is run
        partitioner = XnnpackPartitioner(configs=_partitioner_configs())
        edge = to_edge_transform_and_lower(copy.deepcopy(graph), partitioner=[partitioner], compile_config=config)
        calls = Counter(str(n.target) for n in edge.exported_program().graph.nodes if n.op == "call_function")
        delegates, _ = calls.pop("executorch_call_delegate", 0), calls.pop("<built-in function getitem>", 0)
        if calls or delegates != 1:
            raise CheckFailed(f"XNNPACK did not take the whole network: {delegates} delegate calls, left outside: {dict(calls)}")
        path.write_bytes(edge.to_executorch().buffer)
    return [path]


def _partitioner_configs() -> "list[type[XNNPartitionerConfig]]":
    """Those of ExecuTorch, and products of two INT8 tensors, for which XNNPACK has a kernel that they do not offer it."""
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import BMMConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType

    class IntegerBMMConfig(BMMConfig):
        def supported_precision_types(self) -> list[ConfigPrecisionType]:
            return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]

    return [IntegerBMMConfig if config is BMMConfig else config for config in ALL_PARTITIONER_CONFIGS]


def import_runtime() -> str:
    from gcvit_edge.backends._executorch_runtime import without_exporter

    with without_exporter():
        import executorch.runtime
    return executorch.__name__


def load(path: Path, threads: int) -> "Runner":
    """Loads a .pte into the Python runtime. The XNNPACK thread pool belongs to the process: the last call sets it."""
    import_runtime()
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(path).load_method("forward")
    if method is None:
        raise CheckFailed(f"{path} has no method 'forward'")

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return method.execute([torch.from_numpy(image)])[0].numpy().copy()

    return run


def requirements(path: Path) -> dict[str, Any]:
    """A .pte is promised to load in the ExecuTorch minor version that wrote it (runtime/COMPATIBILITY.md)."""
    major, minor = version("executorch").split(".")[:2]
    return {"runtime": "executorch", "minimum_version": f"{major}.{minor}.0", "delegates": ["XnnpackBackend"], "operators": []}


def profile(path: Path, threads: int, image: NDArray[np.float32], runs: int) -> tuple[list[TimedOperator], int | None]:
    """From ETDump, in which XNNPACK times its own operators. Source: ExecuTorch documentation, "Profiling models"."""
    import torch
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
    module = portable_lib._load_for_executorch(str(path), enable_etdump=True)
    for _ in range(runs):
        module.forward([torch.from_numpy(image)])
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "profile.etdp"
        module.write_etdump_result_to_file(str(dump), str(Path(folder) / "debug.bin"))
        return read_etdump(dump)


def read_etdump(path: Path) -> tuple[list[TimedOperator], int | None]:
    """The operators, and the number of delegate calls, of an ETDump file of any machine.

    Raises:
        UserError: it is no such file, or not a whole one.
    """
    from executorch.devtools import Inspector

    try:
        blocks = Inspector(etdump_path=str(path)).event_blocks
    except OSError:
        raise
    except Exception as error:  # of several kinds, by where the file stops to be one
        raise UserError(
            f"{path} is no ETDump, or not a whole one; expected a file that `gcvit-edge benchmark --etdump DIR` wrote"
        ) from error
    operators: list[TimedOperator] = []
    whole, delegate_calls = 0.0, 0
    for block in blocks:
        for event in block.events:
            delegate_calls += event.name == "DELEGATE_CALL"
            times = event.perf_data.raw if event.perf_data else []
            if event.name == "Method::execute":
                whole += float(np.median(times))
            if not times or event.name in _BRACKETS:
                continue
            name = event.name.rsplit(" #", 1)[0]
            name = _NAMES.get(name, name)
            kind = _kind(name)
            integer = kind == "matrix" and any(part in name for part in ("QS8", "QU8", "QD8", "QDU8", "QC8)"))
            operators.append(TimedOperator(event.name, name, kind, float(np.median(times)), integer, bool(event.is_delegated_op)))
    return [*_averages_apart(operators), *_unattributed(operators, whole)], delegate_calls


def _unattributed(operators: list[TimedOperator], whole: float) -> list[TimedOperator]:
    """What an inference takes, in ms, beyond its operators: XNNPACK cuts their times off to whole microseconds, and what interrupts
    one now and then is in no median."""
    rest = whole - sum(each.ms for each in operators)
    delegated = all(each.delegated for each in operators)
    return [TimedOperator("unattributed", "Unattributed", "unattributed", rest, delegated=delegated)] if rest > 0 else []


def _averages_apart(operators: list[TimedOperator]) -> list[TimedOperator]:
    """Averages over channels, of norms and centring, are products too, which only what they are for tells from linears: the operator
    after them is a root or a difference."""

    def apart(each: TimedOperator, following: TimedOperator) -> TimedOperator:
        is_average = each.operator.startswith("Fully Connected") and following.operator.startswith(("Reciprocal Square Root", "Subtract"))
        return replace(each, operator=f"{each.operator} of averages", kind="other") if is_average else each

    return [*map(apart, operators, operators[1:]), *operators[-1:]]


def _kind(name: str) -> Kind:
    for kind, starts in _KINDS.items():
        if name.startswith(starts):
            return kind
    return "other"


_NAMES = {"Invalid Unary Op": "Table Lookup (NC, S8)"}  # GELU of integers, which XNNPACK makes a table of and has no name for then
_BRACKETS = {"DELEGATE_CALL", "OPERATOR_CALL", "Method::execute", "Method::init", "Program::load_method"}  # events around others
_KINDS: dict[Kind, tuple[str, ...]] = {
    "matrix": ("Fully Connected", "Convolution", "Batch Matrix Multiply", "Deconvolution"),
    "quantization": ("Convert",),
    "layout": ("Transpose", "Static Reshape", "Copy", "Static Slice", "Concatenate"),
}
