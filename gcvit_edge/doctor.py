"""What is installed, and what works on this machine."""

import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.backends import backend_names, load_backend, package_version
from gcvit_edge.cpus import default_threads
from gcvit_edge.lower import lower_quantized
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.measurement.machine import cpu_name, int8_features, without_int8_products
from gcvit_edge.progress import Steps
from gcvit_edge.recipe import Recipe, parse_recipe, recipe_text
from gcvit_edge.targets import load_target, target_names

if TYPE_CHECKING:
    from gcvit_edge.model.gcvit import GCViT
    from gcvit_edge.quantization.calibrate import Calibrated

PACKAGES = ("torch", "torchao", "executorch", "openvino", "nncf", "onnx", "onnxscript", "onnxruntime", "numpy")


def examine(steps: Steps, *, quick: bool) -> dict[str, Any]:
    """Versions, CPU features, and (unless `quick`) whether each backend can make and run a small INT8 model here."""
    features = [{"flag": flag, "meaning": meaning, "present": present} for flag, meaning, present in int8_features()]
    backends = dict.fromkeys(backend_names(), "not tried")
    if not quick:
        for name in backends:
            with steps.step(f"try {name}"):
                backends[name] = _try(name)
    failed = [name for name, state in backends.items() if state.startswith("fails")]
    verdict = without_int8_products(backends) or "INT8 runs on this CPU's own INT8 instructions."
    if failed:
        verdict += f" Not working: {', '.join(failed)}."
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": backends,
        "targets": {name: load_target(name).missing("") or "available" for name in target_names()},
        "cpu": cpu_name(),
        "cpus": default_threads(),
        "int8_features": features,
        "verdict": verdict,
    }


def _version(name: str) -> str | None:
    try:
        return package_version(name)
    except PackageNotFoundError:
        return None


@cache
def _small() -> "tuple[GCViT, Calibrated, Recipe, NDArray[np.float32]]":
    """A tiny GC ViT, calibrated by a recipe, and an image of it."""
    import torch

    from gcvit_edge.model.create import create_model
    from gcvit_edge.quantization.calibrate import calibrate

    torch.manual_seed(0)
    model = create_model(dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=32, window_size=(1, 1, 2, 1))
    images = list(np.random.default_rng(0).standard_normal((8, 1, 3, 32, 32), np.float32))
    recipe = parse_recipe(recipe_text("int8_ptq"), "int8_ptq")
    return model, calibrate(model, recipe, lambda: iter(images)), recipe, images[0]


def _try(name: str) -> str:
    """Makes its INT8 artifact and runs it; whatever goes wrong is the answer, not an error."""
    try:
        import torch

        from gcvit_edge.model.create import describe_model

        model, calibrated, recipe, image = _small()
        with tempfile.TemporaryDirectory() as folder:
            artifact = lower_quantized(name, calibrated, describe_model(model), recipe, Path(folder))
            got = load_backend(name).load(artifact.path, 1)(image)
        with torch.no_grad():
            parity = sqnr_db(got, model(torch.from_numpy(image)).numpy())
        return f"works ({parity:.0f} dB on a small INT8 model)" if parity > 15 else f"fails: wrong answers, {parity:.0f} dB"
    except Exception as error:  # a doctor reports what is broken, whatever it is
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
