"""x86 CPUs without VNNI add two products of bytes in 16 bits, which may be too few: `IntegerWeight` leaves them enough.

QEMU plays a Haswell, so that this is seen on any x86 machine.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gcvit_edge.backends import load_backend
from gcvit_edge.data import Labels
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.quantization.integers import Affine, IntegerWeight
from gcvit_edge.quantization.layers import DynamicConv, DynamicLinear, StaticConvLinear, StaticLayer

REASON = "needs an x86 machine, and qemu-x86_64 of Debian's package qemu-user"
missing = platform.machine() != "x86_64" or shutil.which("qemu-x86_64") is None
pytestmark = pytest.mark.skipif(missing and os.environ.get("CI") != "true", reason=REASON)

HASWELL = "Haswell,-rtm,-hle,-pcid,-x2apic,-tsc-deadline,-invpcid"  # less what QEMU does not emulate, and says so
RUN = """
import sys
from pathlib import Path
import numpy as np
from gcvit_edge.backends import load_backend
for backend, artifact, folder in zip(*[iter(sys.argv[1:])] * 3):
    image = np.load(Path(folder) / "image.npy")
    np.save(Path(folder) / "answer.npy", load_backend(backend).load(Path(artifact), 1)(image))
"""
PLACES = [("onnx", "linear"), ("onnx", "conv"), ("openvino", "linear"), ("openvino", "linear as conv"), ("openvino", "conv")]


def layer(backend: str, kind: str) -> tuple[nn.Module, torch.Tensor]:
    """One layer as the backend has it in INT8, and an input: weights of one sign and activations near the end of their range."""
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 32, 3, padding=1) if kind == "conv" else nn.Linear(64, 32)
    nn.init.uniform_(plain.weight, 0.5, 1)
    x = 0.5 + torch.rand(1, 16, 14, 14) / 2 if kind == "conv" else 0.5 + torch.rand(49, 64) / 2
    if backend == "openvino":
        static = StaticConvLinear if kind == "linear as conv" else StaticLayer
        return static(plain, Affine.of_range(0, 1, "uint8"), None), x  # type: ignore[arg-type]
    return (DynamicLinear(plain) if isinstance(plain, nn.Linear) else DynamicConv(plain)), x


def exactness(folder: Path) -> dict[tuple[str, str], float]:
    """SQNR in dB on a Haswell against the simulation in PyTorch, by backend and kind of layer."""
    info = describe_model(
        create_model(dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=2, img_size=32), Labels.of(["a", "b"])
    )
    arguments, simulated = [], {}
    for backend_name, kind in PLACES:
        backend, (module, x) = load_backend(backend_name), layer(backend_name, kind)
        place = folder / backend_name / kind
        place.mkdir(parents=True)
        path = place / backend.ARTIFACT.format(precision="int8")
        with torch.no_grad():
            simulated[backend_name, kind] = module(x).numpy()
            backend.save(backend.capture(module.eval(), x), path, info)
        np.save(place / "image.npy", x.numpy())
        arguments += [backend_name, str(path), str(place)]
    subprocess.run(["qemu-x86_64", "-cpu", HASWELL, sys.executable, "-c", RUN, *arguments], check=True)
    answers = {place: np.load(folder / place[0] / place[1] / "answer.npy") for place in PLACES}
    return {place: sqnr_db(answer.reshape(len(answer), -1), simulated[place].reshape(len(answer), -1)) for place, answer in answers.items()}


def test_products_are_exact(tmp_path: Path) -> None:
    found = exactness(tmp_path)
    assert min(found.values()) > 60, found


@pytest.mark.slow
def test_they_would_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should runtimes no longer need it, the bound can go."""
    monkeypatch.setattr(IntegerWeight, "PAIR", 10**6)
    found = exactness(tmp_path)
    assert max(found.values()) < 30, found
