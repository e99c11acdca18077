"""Where a run computes, in which precision and in what memory: the processes of Accelerate, on CPUs or GPUs."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gcvit_edge.errors import UserError
from gcvit_edge.measurement.machine import cpu_name, has_bfloat16
from gcvit_edge.training.settings import TrainSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

_WAIT = timedelta(hours=24)  # for another process, while the main one reads every image, alone; NCCL's 10 minutes are soon over
# of malloc.h; the numbers behind them are glibc's own for a process that has had large tensors
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_MEMORY_OF_GLIBC = {_M_MMAP_MAX: 65_536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20}
_MEMORY_KEPT = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
_Settings = TypeVar("_Settings", bound=TrainSettings)


def make_accelerator(device: str) -> "Accelerator":
    """The processes of this run (one, or those of `accelerate launch`), on "cpu", "cuda", or "auto": CUDA if there is any.

    Raises:
        UserError: no CUDA device, Accelerate is not installed, it computes elsewhere (its configuration says so, or an earlier run of
            this Python process did), or it would share out the network.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; check the driver and the PyTorch build, or use --device cpu")
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
    except ModuleNotFoundError as error:
        raise UserError(f"training needs the package {error.name!r}, which is not installed: pip install {error.name}") from error
    # short networks have weights that no output depends on, such as the global query of a stage without a global block
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True), InitProcessGroupKwargs(timeout=_WAIT)]
    try:
        accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers)
    except ValueError as error:
        raise UserError(f"--device {device}: {error}") from error
    if device not in ("auto", accelerator.device.type):
        raise UserError(
            f"--device {device}, but Accelerate computes on {accelerator.device}: its configuration, ACCELERATE_USE_CPU or an earlier run "
            "of this Python process says so; change that, or start a new process"
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"Accelerate is configured for {accelerator.distributed_type.value}, and this network fits a GPU as it is; give accelerate "
            "launch --multi_gpu"
        )
    return accelerator


def device_name(accelerator: "Accelerator") -> str:
    """What a process of the run computes on."""
    return cpu_name() if accelerator.device.type == "cpu" else torch.cuda.get_device_name(accelerator.device)


def with_precision(settings: _Settings, accelerator: "Accelerator") -> _Settings:
    """The same with "auto" decided: bfloat16 where the device has instructions for its products. Elsewhere they are emulated, and a step
    takes eleven times as long as in float32 (docs/training.md)."""
    if settings.precision != "auto":
        return settings
    native = has_bfloat16() if accelerator.device.type == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
    return settings.model_copy(update={"precision": "bfloat16" if native else "float32"})


@contextmanager
def memory_kept(device: torch.device) -> Iterator[None]:
    """On a CPU, memory of tensors is kept for the next ones. glibc gives that of large ones back to the system, and has it anew in the
    next operator, page by page: a seventh of a training step (benchmarks/NOTES.md). C libraries without `mallopt` stay as they
    are.

    Source: mallopt(3).
    """
    library = ctypes.CDLL(None)
    if device.type != "cpu" or not hasattr(library, "mallopt"):
        yield
        return
    try:
        for parameter, value in _MEMORY_KEPT.items():
            library.mallopt(parameter, value)
        yield
    finally:
        for parameter, value in _MEMORY_OF_GLIBC.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
