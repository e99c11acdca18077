"""Who may import whom: backends stand alone, and what runs without torch does not load it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gcvit_edge

PACKAGE = Path(gcvit_edge.__file__).parent
BACKENDS = sorted(path.stem for path in (PACKAGE / "backends").glob("*.py") if not path.stem.startswith("_"))
RUNTIMES = {"torch", "torchvision", "torchao", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "executorch"}
LIGHT = ["recipe", "errors", "registry", "artifact", "cache", "model/info", "schema", "training/settings",
         *(f"{package}/{path.stem}" for package in ("data", "bundle", "measurement")
         for path in sorted((PACKAGE / package).glob("*.py")))]  # fmt: skip


def imported(nodes: list[ast.stmt]) -> Iterator[str]:
    """Modules that these statements import; of `from a import b`, both `a` and `a.b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def everywhere(path: Path) -> set[str]:
    """Modules that a file imports anywhere, inside functions too."""
    return set(imported([node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.stmt)]))


def at_import(path: Path) -> set[str]:
    """Modules that importing a file imports: all but those inside functions and `if TYPE_CHECKING`."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    found = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
            continue
        if isinstance(node, ast.stmt):
            found |= set(imported([node]))
        pending += ast.iter_child_nodes(node)
    return found


def within(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(f"{package}.")}


def loaded(code: str) -> set[str]:
    """Of the runtimes, those that some code loads in a fresh process."""
    script = f"{code}\nimport sys\nprint(*(name for name in {sorted(RUNTIMES)!r} if name in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout.split())


def test_the_three_backends_are_looked_at() -> None:
    assert {"executorch", "onnx", "openvino"} <= set(BACKENDS)


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_stand_alone(name: str) -> None:
    names = everywhere(PACKAGE / "backends" / f"{name}.py")
    others = {f"gcvit_edge.backends.{other}" for other in BACKENDS if other != name}
    assert not names & others
    for package in ("gcvit_edge.cli", "gcvit_edge.targets", "gcvit_edge.pipeline", "gcvit_edge.report"):
        assert not within(names, package)


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_import_nothing_heavy(name: str) -> None:
    assert not {module.split(".")[0] for module in at_import(PACKAGE / "backends" / f"{name}.py")} & RUNTIMES
    assert loaded(f"import gcvit_edge.backends.{name}") == set()


@pytest.mark.parametrize("name", BACKENDS)
def test_what_runs_artifacts_loads_nothing_that_makes_them(name: str) -> None:
    exporters = {"executorch.exir", "torch._dynamo", "torch._inductor", "torch.onnx", "onnx", "onnxscript", "nncf"}
    script = (
        f"import sys\nfrom gcvit_edge.backends import load_backend, package_version\n"
        f"package_version(load_backend({name!r}).import_runtime())\nprint(sorted({exporters!r} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout == "[]\n"


def test_executorch_can_export_after_its_runtime_was_imported() -> None:
    script = (
        "from gcvit_edge.backends import load_backend\nload_backend('executorch').import_runtime()\n"
        "import executorch.exir, executorch.exir._warnings\nfrom executorch.exir import to_edge_transform_and_lower\n"
        "from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner\nprint('imported')"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120).stdout == "imported\n"


@pytest.mark.parametrize("name", LIGHT)
def test_modules_without_torch(name: str) -> None:
    assert not {module.split(".")[0] for module in at_import(PACKAGE / f"{name}.py")} & RUNTIMES


def test_targets_load_nothing_heavy() -> None:
    script = "import sys\nfrom gcvit_edge.targets import load_target, target_names\nfor name in target_names(): load_target(name)\n"
    heavy = f"print([name for name in {sorted(RUNTIMES | {'numpy', 'PIL', 'pydantic', 'yaml'})!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script + heavy], capture_output=True, text=True, check=True, timeout=60).stdout == "[]\n"


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: path.stem)
def test_verbs_import_only_light_modules(path: Path) -> None:
    allowed = {"gcvit_edge.cli", "gcvit_edge.errors", "gcvit_edge.interruption", "gcvit_edge.registry"}
    own = {name for name in at_import(path) if name.startswith("gcvit_edge.")}
    assert all(any(name == a or name.startswith(f"{a}.") for a in allowed) for name in own), own


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_only_the_command_line_imports_the_command_line(path: Path) -> None:
    if path.parent.name != "cli" and path.name != "__main__.py":
        assert not within(everywhere(path), "gcvit_edge.cli")


@pytest.mark.parametrize("module", ["gcvit_edge", "gcvit_edge.bundle", "gcvit_edge.measurement.measure", "gcvit_edge.targets._worker"])
def test_no_runtime_is_loaded(module: str) -> None:
    assert loaded(f"import {module}") == set()


def test_public_names_load_on_first_use() -> None:
    assert loaded("from gcvit_edge import Bundle, open_bundle, quantize, export_float") == set()
    assert "torch" in loaded("from gcvit_edge import create_model")
    assert all(getattr(gcvit_edge, name) is not None for name in gcvit_edge.__all__)
    with pytest.raises(AttributeError, match="module 'gcvit_edge' has no attribute 'quantise'"):
        _ = gcvit_edge.quantise
