"""An NVIDIA GPU of this machine: the network in PyTorch, and artifacts in the runtimes that have a GPU build; each in a fresh process."""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gcvit_edge.errors import CheckFailed, UserError, unknown_name
from gcvit_edge.targets import Case, Connection
from gcvit_edge.targets._process import LocalFolder, ProcessSession

if TYPE_CHECKING:
    from gcvit_edge.artifact import Artifact, Computed
    from gcvit_edge.measurement.machine import Machine
    from gcvit_edge.measurement.parity import Arithmetic

HELP = ("NVIDIA GPU, cuda:1 for the second; runs PyTorch with --weights, onnx where ONNX Runtime has its CUDA provider, openvino where "
        "OpenVINO has its NVIDIA plugin")  # fmt: skip
ADDRESS = "optional"
MEASURES_TIME = True

_ARITHMETIC: "dict[str, Arithmetic]" = {"float32": "float", "tf32": "tf32", "float16": "float16", "bfloat16": "bfloat16"}
WAYS = {
    "eager": "eager",
    "compiled": "compiled",
    "graphs": "CUDA graphs",
    "compiled-graphs": "compiled, CUDA graphs",
    "int8": "torchao, compiled, CUDA graphs",
    "fp8": "FP8, compiled, CUDA graphs",
}
_SHORT: "dict[str, Computed]" = {"int8": "int8", "fp8": "fp8"}  # ways whose linears are shorter than the rest
_FLOAT8_CAPABILITY = (8, 9)  # Ada, Hopper


@dataclass(frozen=True)
class Options:
    """weights: of the bundle's network; the bundle itself has no checkpoint. INT8 (torchao's) and FP8 are of linears, the rest is in
    `arithmetic`."""

    weights: Path | None = field(default=None, metadata={"help": "checkpoint that the bundle was made of, for PyTorch"})
    arithmetic: str = field(default="float32", metadata={"help": f"of PyTorch: {', '.join(_ARITHMETIC)} (float32)"})
    ways: str = field(
        default="",
        metadata={"help": f"to run PyTorch, some of {','.join(WAYS)} (all that can run; int8 is torchao's)"},
    )


def missing(address: str) -> str | None:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "no NVIDIA driver on this machine (libcuda cannot be loaded); install it, or measure on a machine with an NVIDIA GPU"
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA; install a CUDA build of it (see pytorch.org, Get Started)"
    if not torch.cuda.is_available():
        return (f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU that it can use; does nvidia-smi list one, "
                "and is the driver as new as that CUDA?")  # fmt: skip
    return None


def cases(artifacts: "Sequence[Artifact]", options: Options) -> list[Case]:
    return [*_pytorch_cases(artifacts, options), *_artifact_cases(artifacts, _gpu_runtimes())]


def _pytorch_cases(artifacts: "Sequence[Artifact]", options: Options) -> list[Case]:
    """The ways of PyTorch, if there are weights; golden is a float artifact, or the first one if the bundle has none in float."""
    from gcvit_edge.artifact import Artifact
    from gcvit_edge.model.create import load_model

    if options.arithmetic not in _ARITHMETIC:
        raise unknown_name("arithmetic", options.arithmetic, _ARITHMETIC)
    ways = options.ways.replace(" ", "").split(",") if options.ways else [way for way in WAYS if _lacks(way) is None]
    for way in ways:
        if way not in WAYS:
            raise unknown_name("way to run PyTorch", way, WAYS)
        if lack := _lacks(way):
            raise UserError(f"way {way} needs {lack}, or leave {way} out of --ways")
    if options.weights is None:
        return []
    weights = options.weights.resolve()
    if not weights.is_file():
        raise UserError(f"checkpoint {options.weights} does not exist; give --weights the file that the bundle was made of")
    load_model(str(weights))  # what is wrong with it is wrong with every way
    golden = next((artifact for artifact in artifacts if artifact.precision == "float"), artifacts[0])
    name = options.arithmetic
    return [
        Case(Artifact("pytorch", _SHORT.get(way, "float"), weights, (weights,)), f"{WAYS[way]}, {name}", computed_in(way, name), golden)
        for way in ways
    ]


def computed_in(way: str, arithmetic: str) -> "Arithmetic":
    """The shortest that a way computes in, with the rest of the network in `arithmetic`."""
    return _SHORT[way] if way in _SHORT else _ARITHMETIC[arithmetic]


def _lacks(way: str) -> str | None:
    """What a way needs that is not here, in words; torchao comes with this package, but not with a PyTorch that was there before."""
    if way == "int8" and not find_spec("torchao"):
        return "the package torchao, which is not installed; install it"
    if way == "fp8" and not _multiplies_float8():
        return "a GPU of compute capability 8.9 or later (Ada, Hopper); measure on one"
    return None


def _multiplies_float8() -> bool:
    import torch

    # one of them: a way that the GPU asked for does not run is told when it is loaded
    return any(torch.cuda.get_device_capability(each) >= _FLOAT8_CAPABILITY for each in range(torch.cuda.device_count()))


def _artifact_cases(artifacts: "Sequence[Artifact]", runtimes: dict[str, str]) -> list[Case]:
    return [Case(artifact, runtimes[artifact.backend]) for artifact in artifacts if artifact.backend in runtimes]


def _gpu_runtimes() -> dict[str, str]:
    """By backend, how its runtime uses an NVIDIA GPU; without those that are not installed or are built without it."""
    found = {}
    try:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            found["onnx"] = "CUDA provider"
    except ImportError:
        pass
    try:
        import openvino

        if any(device.startswith("NVIDIA") for device in openvino.Core().available_devices):
            found["openvino"] = "NVIDIA plugin"
    except ImportError:
        pass
    return found


@contextmanager
def connect(address: str, options: Options) -> Iterator[Connection]:
    import torch

    count = torch.cuda.device_count()
    if address and not address.isdigit():
        raise UserError(f"cuda:{address}: give the number of a GPU, such as cuda:0")
    if int(address or 0) >= count:
        raise UserError(f"there is no GPU {address or 0}: PyTorch finds {count}; see nvidia-smi")
    yield Gpu(f"cuda:{address or 0}")


@dataclass(frozen=True)
class Gpu(Connection):
    """A device of PyTorch on this machine. device: such as cuda:0, or cpu, which is for tests."""

    device: str

    def machine(self) -> "Machine":
        import torch

        from gcvit_edge.measurement.machine import this_machine

        gpu = torch.cuda.get_device_name(self.device) if self.device != "cpu" else None
        return this_machine().model_copy(update={"accelerator": gpu and f"{gpu}, CUDA {torch.version.cuda}"})

    def open(self, case: Case, threads: int, *, pinned: bool) -> ProcessSession:
        artifact = case.artifact
        command = [sys.executable, "-P", "-m", "gcvit_edge.targets._cuda_worker", artifact.backend, str(artifact.path.resolve()),
                   str(threads), self.device, case.execution]  # fmt: skip
        try:
            return ProcessSession(artifact, command, LocalFolder())
        except CheckFailed as error:
            way = {steps: way for way, steps in WAYS.items()}.get(case.execution.rpartition(", ")[0])
            if artifact.backend != "pytorch" or way == "eager":  # the plainest needs nothing that others do without
                raise
            raise CheckFailed(f"{str(error).rstrip()}\nto do without it, give --ways without {way}") from error
