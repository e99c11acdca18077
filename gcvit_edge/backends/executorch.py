"""ExecuTorch: .pte for XNNPACK, quantized by torchao's PT2E flow with XNNPACK's quantizer.

The whole network is one XNNPACK delegate call. Sources: ExecuTorch 1.5, "XNNPACK Backend" and its quantization page.
"""

import copy
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.errors import CheckFailed
from gcvit_edge.recipe import Operator, Recipe

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

    from gcvit_edge.backends import Runner
    from gcvit_edge.model.gcvit import GCViT
    from gcvit_edge.model.info import ModelInfo

# XNNPACK has integer kernels for these; ExecuTorch gives it products of two activations, softmax and GELU in float only
INTEGER_OPERATORS: frozenset[Operator] = frozenset({"linear", "conv", "residual"})
ARTIFACT = "model.{precision}.pte"
RUNTIME = "executorch.runtime"
PACKAGES = ("executorch", "torch", "torchao")


def capture(model: "GCViT", info: "ModelInfo") -> "ExportedProgram":
    """Exports the deploy form: norms written out (XNNPACK has no LayerNorm), rank-3 attention products (no expand)."""
    import torch

    from gcvit_edge.model.deploy import Form, deploy

    deployed = deploy(model, Form(norm="rms", product_rank=3))
    example = torch.zeros(1, model.config.in_chans, *model.config.img_size)
    return torch.export.export(deployed, (example,), strict=True)


def quantize(graph: "ExportedProgram", recipe: Recipe, images: Iterable[NDArray[np.float32]]) -> "ExportedProgram":
    """PT2E: observers where XNNPACK has integer kernels, calibration, conversion. Position biases are stored as INT8."""
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True)
    aten = torch.ops.aten
    targets = {"linear": aten.linear.default, "conv": aten.conv2d.default, "residual": aten.add.Tensor}
    quantizer = XNNPACKQuantizer().set_filter_function(_is_worth_it)
    for operator in INTEGER_OPERATORS & set(recipe.operators):
        quantizer.set_operator_type(targets[operator], config)  # type: ignore[arg-type]  # compared with overloads inside
    module = prepare_pt2e(graph.module(), quantizer)
    with torch.no_grad():
        for image in images:
            module(torch.from_numpy(image))
    module = convert_pt2e(module)
    _store_position_bias_as_int8(module)
    assert graph.example_inputs is not None  # capture() has given them
    return torch.export.export(module, graph.example_inputs[0], strict=True)


def _is_worth_it(node: "Node") -> bool:
    """Not the averages of norms, whose one output channel gains nothing and whose error would scale the whole stream; nor the
    convolution of the image, see the recipe; nor additions of constants (position bias, epsilon), which are no residuals."""
    operands = node.all_input_nodes
    if any("average" in str(operand.target) or operand.op == "placeholder" for operand in operands):
        return False
    return not str(node.target).startswith("aten.add") or [operand.op for operand in operands] == ["call_function"] * 2


def _store_position_bias_as_int8(module: "GraphModule") -> None:
    """Replaces each float position bias by INT8 values and a dequantization, which XNNPACK runs inside its delegate.

    They are 14 % of the float file of XXT, so in float they would be a third of the INT8 one. Their rounding leaves 84 dB.
    """
    import torch

    constants = [node for node in module.graph.nodes if node.op == "get_attr" and "position_bias" in str(node.target)]
    for node in constants:
        bias = _attribute(module, str(node.target))
        scale = bias.abs().max().item() / 127
        name = str(node.target).replace(".", "_") + "_int8"
        module.register_buffer(name, torch.round(bias / scale).to(torch.int8))
        with module.graph.inserting_after(node):
            values = module.graph.get_attr(name)
        with module.graph.inserting_after(values):
            dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
            restored = module.graph.call_function(dequantize, (values, scale, 0, -128, 127, torch.int8))
        node.replace_all_uses_with(restored)
        module.graph.erase_node(node)
    module.recompile()


def _attribute(module: Any, target: str) -> "torch.Tensor":
    for part in target.split("."):
        module = getattr(module, part)
    return module


def save(graph: "ExportedProgram", path: Path, info: "ModelInfo") -> list[Path]:
    """Lowers to XNNPACK and writes the .pte.

    Raises:
        CheckFailed: something was left outside the one delegate call, which would be slow and need portable kernels.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    from gcvit_edge.backends._fast_lowering import fast_lowering

    with fast_lowering():
        config = EdgeCompileConfig(_check_ir_validity=False)  # what is not valid shows below, and when the file is run
        edge = to_edge_transform_and_lower(copy.deepcopy(graph), partitioner=[XnnpackPartitioner()], compile_config=config)
    calls = Counter(str(n.target) for n in edge.exported_program().graph.nodes if n.op == "call_function")
    delegates, _ = calls.pop("executorch_call_delegate", 0), calls.pop("<built-in function getitem>", 0)
    if calls or delegates != 1:
        raise CheckFailed(f"XNNPACK did not take the whole network: {delegates} delegate calls, left outside: {dict(calls)}")
    path.write_bytes(edge.to_executorch().buffer)
    return [path]


def load(path: Path, threads: int) -> "Runner":
    """Loads a .pte into the Python runtime. The XNNPACK thread pool belongs to the process: the last call sets it."""
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
