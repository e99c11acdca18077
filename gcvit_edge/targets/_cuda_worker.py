"""A fresh process that holds one artifact on a GPU: `python -m gcvit_edge.targets._cuda_worker BACKEND FILE THREADS DEVICE STEPS`.

Its protocol is that of `_process.py`. BACKEND is pytorch, where FILE is a checkpoint, or onnx or openvino. DEVICE is PyTorch's name,
such as cuda:0; with cpu the same code runs without a GPU, all but CUDA graphs. STEPS are those of `cuda.py`. An inference is timed
from and to the memory of the host: both copies are in it.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.backends import Runner, load_backend
from gcvit_edge.targets._worker import serve

if TYPE_CHECKING:
    from torch import Tensor, nn

_MIN_ROWS = 17  # of a matrix that cuBLAS multiplies in INT8; the sides of the weights must be multiples of 8
_WARM_UP = 3  # before capture, on another stream: PyTorch documentation, "CUDA semantics", CUDA Graphs


def main() -> None:
    backend, path, threads, device, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5].split(", ")
    match backend:
        case "pytorch":
            import torch

            torch.set_num_threads(threads)
            torch.zeros(1, device=device)  # makes CUDA's context, which belongs to the runtime
            serve(lambda: "torch", lambda: load_pytorch(path, device, steps))
        case "onnx":
            serve(load_backend(backend).import_runtime, lambda: load_onnx(path, device, threads))
        case "openvino":
            serve(load_backend(backend).import_runtime, lambda: load_openvino(path, device))
        case _:
            raise ValueError(f"no GPU runtime for {backend}")


def load_pytorch(path: str, device: str, steps: list[str]) -> Runner:
    """The network of a checkpoint, after `steps`."""
    import torch

    from gcvit_edge import load_model

    tf32 = "tf32" in steps
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # on by default
    dtype = torch.float16 if "float16" in steps else torch.bfloat16 if "bfloat16" in steps else torch.float32
    model = load_model(path)[0].to(device, dtype)
    example = torch.zeros(1, model.config.in_chans, *model.config.img_size, device=device, dtype=dtype)
    with torch.no_grad():
        if "torchao" in steps:
            quantize_linears(model, example)
        forward: Callable[[Tensor], Tensor] = model
        if "compiled" in steps:
            forward = torch.compile(model)
            forward(example)  # compiles it now: what cannot be compiled is not loaded, and does not fail among others that are timed
        if "CUDA graphs" in steps:
            forward = capture(forward, example)

    @torch.no_grad()
    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return forward(torch.from_numpy(image).to(device, dtype)).float().cpu().numpy()

    return run


def quantize_linears(model: "nn.Module", example: "Tensor") -> int:
    """torchao's INT8, weights per channel and activations dynamic per token, of all linears that cuBLAS can run; returns how many."""
    from torch import nn
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    rows: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: "tuple[Tensor, ...]") -> None:
        rows[module] = inputs[0].numel() // inputs[0].shape[-1]

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(count) for module in linears]
    model(example)
    for hook in hooks:
        hook.remove()

    fits = {m for m in linears if rows.get(m, 0) >= _MIN_ROWS and m.in_features % 8 == m.out_features % 8 == 0}
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, _: module in fits)
    return len(fits)


def capture(forward: "Callable[[Tensor], Tensor]", example: "Tensor") -> "Callable[[Tensor], Tensor]":
    """`forward` as a CUDA graph for inputs like `example`, replayed on what is copied there."""
    import torch

    inputs, stream = example.clone(), torch.cuda.Stream(example.device)
    stream.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            forward(inputs)
    torch.cuda.current_stream(example.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(example.device), torch.cuda.graph(graph):
        outputs = forward(inputs)

    def replay(images: "Tensor") -> "Tensor":
        inputs.copy_(images)
        graph.replay()
        return outputs

    return replay


def load_onnx(path: str, device: str, threads: int) -> Runner:
    """ONNX Runtime's provider for the device, in float32 where it is not integer; what it has no kernel for runs on the CPU."""
    import onnxruntime

    kind, _, index = device.partition(":")
    if kind == "cuda" and hasattr(onnxruntime, "preload_dlls"):  # 1.21; without it, a CUDA that pip installed is not found
        onnxruntime.preload_dlls()
    providers: dict[str, list[Any]] = {
        "cuda": [("CUDAExecutionProvider", {"device_id": index, "use_tf32": "0"}), "CPUExecutionProvider"],
        "cpu": ["CPUExecutionProvider"],
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=providers[kind])
    if kind == "cuda" and "CUDAExecutionProvider" not in session.get_providers():  # it falls back without an error
        raise RuntimeError("ONNX Runtime could not load its CUDA provider: do its CUDA and cuDNN versions match those installed?")
    name = session.get_inputs()[0].name

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(session.run(None, {name: image})[0])

    return run


def load_openvino(path: str, device: str) -> Runner:
    """OpenVINO's plugin for the device, in float32 where it is not integer."""
    import openvino

    kind, _, index = device.partition(":")
    plugin = {"cuda": f"NVIDIA.{index}", "cpu": "CPU"}[kind]
    request = openvino.Core().compile_model(path, plugin, {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return request.infer([image])[0].copy()

    return run


if __name__ == "__main__":
    main()
