"""Programs of `benchmarks/`, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def benchmark_program(name: str) -> ModuleType:
    """`benchmarks/NAME.py`, loaded; skips where there is none."""
    file = FOLDER / f"{name}.py"
    if not file.is_file():
        pytest.skip("a source distribution has no benchmarks")
    spec = importlib.util.spec_from_file_location(f"benchmark_of_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # as Python does for a script
        spec.loader.exec_module(module)
    return module
