"""The bundle of a tiny network, and ways to change one."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tiny import Tiny

import gcvit_edge
from gcvit_edge import Bundle

FILES = [
    "README.md", "bundle.json", "golden/image.npy", "golden/image.png", "golden/input.npy", "golden/onnx.int8.npy", "labels.txt",
    "model.int8.onnx", "preprocessor_config.json", "report.json",
]  # fmt: skip


def quantize(tiny: Tiny, output: Path, **options: Any) -> Bundle:
    return gcvit_edge.quantize(
        str(tiny.recipe), tiny.model, calib=tiny.calib, eval=tiny.evaluation, backends=["onnx"], output=output, **options
    )


def listing(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((root / "bundle.json").read_text())
    change(data)
    (root / "bundle.json").write_text(json.dumps(data))


def replace_listed(root: Path, name: str, content: bytes) -> None:
    """Changes a file and its entry in the manifest, as someone would who wants the hashes to agree."""
    (root / name).write_bytes(content)

    def change(data: dict[str, Any]) -> None:
        entry = next(file for file in data["files"] if file["path"] == name)
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}

    edit_manifest(root, change)


def replace_golden(root: Path, tensor: np.ndarray, name: str = "onnx.int8") -> None:
    np.save(root / "changed.npy", tensor)
    replace_listed(root, f"golden/{name}.npy", (root / "changed.npy").read_bytes())
    (root / "changed.npy").unlink()
