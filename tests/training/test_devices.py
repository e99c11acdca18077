"""Where a run computes. What is trained on a GPU is looked at without one: PyTorch's fake tensors say on which device each tensor would
be, and refuse to mix them. Gradients need the driver of a GPU and are not looked at."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from launched import free_port
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gcvit_edge.errors import UserError
from gcvit_edge.model.deploy import deploy
from gcvit_edge.model.gcvit import GCViT
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.quantization.learned import learnable
from gcvit_edge.quantization.scheme import Rounding
from gcvit_edge.recipe import Operator, Recipe
from gcvit_edge.training.devices import make_accelerator, memory_kept, with_precision
from gcvit_edge.training.optimization import objective
from gcvit_edge.training.settings import QatSettings, TrainSettings

OPERATORS: frozenset[Operator] = frozenset({"linear", "conv", "attention", "residual"})


def on_gpu(module: nn.Module) -> nn.Module:
    """With parameters and buffers as fake tensors of a GPU, inside a FakeTensorMode. A tensor that is neither stays where it is."""
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cuda"), value.requires_grad))
        for name, value in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))
    return module


def network(model: GCViT) -> nn.Module:
    return model.train()


def student(model: GCViT) -> nn.Module:
    recipe = Recipe(name="tiny", description="")  # type: ignore[call-arg]
    images = torch.randn(4, 1, 3, 32, 32).numpy()
    return learnable(
        calibrate(model, recipe, lambda: iter(images)), [Rounding(OPERATORS, Arithmetic(activations="int8", linear_output=True))]
    )


@pytest.mark.parametrize("trained", [network, student])
def test_all_of_a_forward_pass_is_on_the_gpu(trained: Callable[[GCViT], nn.Module], small_model: Callable[..., GCViT]) -> None:
    model, teacher = trained(small_model(drop_path=0.1)), deploy(small_model().eval())
    with FakeTensorMode():
        model, teacher = on_gpu(model), on_gpu(teacher)
        images, classes = torch.empty(2, 3, 32, 32, device="cuda"), torch.empty(2, dtype=torch.int64, device="cuda")
        logits = model(images)
        settings = TrainSettings.model_validate({"distillation": {}, "label_smoothing": 0.1})
        assert objective(logits, classes, teacher(images), settings).device.type == logits.device.type == "cuda"
        with pytest.raises(RuntimeError, match="same device"):  # it would be seen
            model(images.cpu())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device() -> None:
    with pytest.raises(UserError, match="--device cuda: PyTorch sees no CUDA device"):
        make_accelerator("cuda")
    assert make_accelerator("auto").device.type == "cpu"


def test_an_accelerator_that_computes_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    make_accelerator("cpu")  # as every run of this process is from now on
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="--device cuda, but Accelerate computes on cpu: its configuration, ACCELERATE_USE_CPU or an"):
        make_accelerator("cuda")


def test_processes_wait_for_hours_while_one_reads_all_images() -> None:
    code = (
        "import torch.distributed as d; from gcvit_edge.training.devices import make_accelerator; make_accelerator('cpu');"
        "print(d.distributed_c10d._get_default_group()._get_backend(d.distributed_c10d._get_pg_default_device()).options._timeout.total_seconds())"
    )
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | launched, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= 6 * 3600


@pytest.mark.parametrize(("native", "decided"), [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_where_the_cpu_has_it(native: bool, decided: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcvit_edge.training.devices.has_bfloat16", lambda: native)
    accelerator = make_accelerator("cpu")
    assert with_precision(QatSettings(precision="auto", epochs=3), accelerator) == QatSettings(precision=decided, epochs=3)
    for precision in ("float32", "bfloat16"):  # as it is asked for
        assert with_precision(TrainSettings(precision=precision), accelerator).precision == precision


@pytest.mark.parametrize(("native", "decided"), [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_where_the_gpu_has_it(native: bool, decided: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    assert with_precision(TrainSettings(precision="auto"), gpu).precision == decided


def test_memory_of_tensors_is_kept_and_given_back() -> None:
    """In a process of its own, whose memory is that of these tensors.

    A block takes a few bytes more than its tensor, for alignment; where a small allocation lands in these, the next tensor finds no
    room and has one block more. So the first steps may have memory anew, and the last ones may not.
    """
    code = """
import resource
from pathlib import Path
import torch
from gcvit_edge.training.devices import memory_kept

torch.set_num_threads(1)

def pages_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(32 << 20)  # 128 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

outside, start = [pages_of_a_step() for _ in range(2)], resident_mib()
with memory_kept(torch.device("cpu")):
    inside = [pages_of_a_step() for _ in range(24)]
    kept = resident_mib() - start
print(min(outside), max(inside[-8:]), kept, resident_mib() - start, pages_of_a_step())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    outside, inside, kept, left, after = map(int, done.stdout.split())
    assert outside > 1000  # had anew
    assert inside < 100
    assert kept > 100  # MiB
    assert left < 20
    assert after > 1000


def test_memory_is_left_alone_on_a_gpu_and_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: int) -> int:
        raise AssertionError

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=refuse, malloc_trim=refuse))
    with memory_kept(torch.device("cuda")):
        pass
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    with memory_kept(torch.device("cpu")):
        pass
