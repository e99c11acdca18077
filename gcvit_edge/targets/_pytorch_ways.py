"""The ways in which PyTorch runs the network on a GPU: eager or compiled, as a CUDA graph, its linears in INT8 or FP8.

Everything but CUDA graphs runs on a CPU too, which is how it is tested.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]

_MIN_ROWS = 17  # of a matrix that cuBLAS multiplies in INT8; the sides of the weights must be multiples of 8
_FLOAT8_MULTIPLE = 16  # of the sides of weights that cuBLAS multiplies in FP8
_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max
_WARM_UP = 3  # before capture, on another stream: PyTorch documentation, "CUDA semantics", CUDA Graphs


def compute_in(steps: Sequence[str]) -> torch.dtype:
    """The type of weights and activations that `steps` ask for; lets products of float32 be TF32 only where they do."""
    tf32 = "tf32" in steps
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # on by default
    return torch.float16 if "float16" in steps else torch.bfloat16 if "bfloat16" in steps else torch.float32


@torch.no_grad()
def prepare(model: nn.Module, steps: Sequence[str], example: Tensor) -> Forward:
    """`model` after `steps` (those of `cuda.py`), for inputs like `example` (N, C, H, W). It is changed."""
    if "torchao" in steps:
        int8_linears(model, example)
    if "FP8" in steps:
        float8_linears(model)
    forward: Forward = model
    if "compiled" in steps:
        forward = torch.compile(model)
        forward(example)  # compiles it now: what cannot be compiled is not loaded, and does not fail among others that are timed
    if example.is_cuda:
        torch.cuda.reset_peak_memory_stats(example.device)  # what compiling and rounding took is not what inferences take
    return capture(forward, example) if "CUDA graphs" in steps else forward


def int8_linears(model: nn.Module, example: Tensor) -> int:
    """torchao's INT8, weights per channel and activations dynamic per token, of all linears that cuBLAS can run; returns how many."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    rows: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows[module] = inputs[0].numel() // inputs[0].shape[-1]

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(count) for module in linears]
    model(example)
    for hook in hooks:
        hook.remove()

    fits = {m for m in linears if rows.get(m, 0) >= _MIN_ROWS and m.in_features % 8 == m.out_features % 8 == 0}
    # else it tunes the compiler for the whole process, and INT8 would be compared with float that was compiled otherwise
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda module, _: module in fits)
    return len(fits)


class Float8Linear(nn.Module):
    """A linear in FP8 (E4M3), a scale for each row of its weights and, found when it runs, of its input; the output is bfloat16 inside.

    Sums are those of the GPU's FP8 units (`use_fast_accum`), as inference usually has them: exact ones take longer on Hopper. Source: "FP8
    Formats for Deep Learning" (arXiv:2209.05433), section 3; the product is `torch._scaled_mm`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = float8_rows(linear.weight.detach())
        self.weight, self.scale = nn.Buffer(weight.t()), nn.Buffer(scale.t())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = float8_rows(x.reshape(-1, x.shape[-1]))
        product = torch.ops.aten._scaled_mm(rows, self.weight, scale, self.scale, out_dtype=torch.bfloat16, use_fast_accum=True)
        return (product.to(x.dtype) if self.bias is None else product.to(x.dtype) + self.bias).reshape(*x.shape[:-1], -1)


def float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) as FP8 and the scale of each row, (M, 1) float32; x is about their product."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _FLOAT8_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def float8_linears(model: nn.Module) -> int:
    """Puts all linears into FP8 whose sides cuBLAS can multiply; returns how many."""
    fits = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.in_features % _FLOAT8_MULTIPLE == module.out_features % _FLOAT8_MULTIPLE == 0
    }
    for name, module in fits.items():
        model.set_submodule(name, Float8Linear(module))
    return len(fits)


@dataclass(frozen=True)
class Captured:
    """A CUDA graph of `forward`, which is kept since the graph reads its weights where they lie; replayed on what is copied to `inputs`."""

    forward: Forward
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    outputs: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        self.inputs.copy_(images)
        self.graph.replay()
        return self.outputs


def capture(forward: Forward, example: Tensor) -> Captured:
    """`forward` as a CUDA graph for inputs like `example`."""
    inputs, stream = example.clone(), torch.cuda.Stream(example.device)
    stream.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            forward(inputs)
    torch.cuda.current_stream(example.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(example.device), torch.cuda.graph(graph):
        outputs = forward(inputs)
    return Captured(forward, graph, inputs, outputs)
