"""A fresh process that holds one artifact on a GPU: `python -m gcvit_edge.targets._cuda_worker BACKEND FILE THREADS DEVICE STEPS`.

Its protocol is that of `_process.py`. BACKEND is pytorch, where FILE is a checkpoint, or onnx or openvino. DEVICE is PyTorch's name,
such as cuda:0; with cpu the same code runs without a GPU, all but CUDA graphs. STEPS are those of `cuda.py`. An inference is timed
from and to the memory of the host: both copies are in it.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.backends import Runner, load_backend
from gcvit_edge.targets._worker import serve


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
    from gcvit_edge.targets._pytorch_ways import compute_in, prepare

    dtype = compute_in(steps)
    model = load_model(path)[0].to(device, dtype)
    forward = prepare(model, steps, torch.zeros(1, model.config.in_chans, *model.config.img_size, device=device, dtype=dtype))

    @torch.no_grad()
    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return forward(torch.from_numpy(image).to(device, dtype)).float().cpu().numpy()

    return run


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
