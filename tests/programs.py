"""Programs beside the package, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark_file(name: str) -> Path:
    """`benchmarks/NAME.py`; skips where there is none."""
    file = BENCHMARKS / f"{name}.py"
    if not file.is_file():
        pytest.skip("a source distribution has no benchmarks")
    return file


def benchmark_program(name: str) -> ModuleType:
    """`benchmarks/NAME.py`, loaded; skips where there is none."""
    return program(benchmark_file(name))


def program(file: Path) -> ModuleType:
    """A program, loaded and not run."""
    spec = importlib.util.spec_from_file_location(f"program_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(file.parent)  # as Python does for a script
        spec.loader.exec_module(module)
    return module
