"""A worker as `gcvit_edge.targets._worker`, with OpenVINO's own choice of precision: `python _openvino_defaults.py FILE THREADS CPUS`.

Where the CPU computes in bfloat16, what is not integer is computed in it, unless INFERENCE_PRECISION_HINT says otherwise. Source: OpenVINO
documentation, "CPU Device", "Floating Point Data Types Specifics".
"""

import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.backends import Runner, load_backend
from gcvit_edge.targets._worker import serve


def load(path: Path, threads: int) -> Runner:
    """Compiles the IR for the CPU, for latency."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return request.infer([image])[0].copy()

    return run


if __name__ == "__main__":
    file, number, cpus = sys.argv[1:]
    if cpus:
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    serve(load_backend("openvino").import_runtime, lambda: load(Path(file), int(number)))
