"""bundle.json: what a bundle holds, with a hash of every file."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gcvit_edge.artifact import Artifact, Computed
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.model.info import ModelInfo

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
GOLDEN_INPUT = "golden/input.npy"
GOLDEN_IMAGES = 2  # in it
GOLDEN_IMAGE, GOLDEN_PREPROCESSED = "golden/image.png", "golden/image.npy"

Role = Literal["artifact", "artifact_data", "golden", "labels", "preprocessing", "report", "card"]


class File(BaseModel):
    """One file of a bundle; path is relative to it, with forward slashes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    sha256: str
    size_bytes: int
    role: Role
    backend: str | None = None
    precision: Computed | None = None


class RecipeCopy(BaseModel):
    """The recipe that made the bundle, verbatim; None in `Manifest.recipe` for a float export."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    text: str


class Manifest(BaseModel):
    """The content of bundle.json. requirements: by backend; tools: versions that made it; results: those of report.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    model: ModelInfo
    recipe: RecipeCopy | None
    files: tuple[File, ...]
    requirements: dict[str, dict[str, Any]]
    tools: dict[str, str]
    results: list[dict[str, Any]]
    within_limits: bool | None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(root: Path, path: Path, role: Role, artifact: Artifact | None = None) -> File:
    """The manifest's entry for a file below `root`."""
    return File(
        path=path.relative_to(root).as_posix(),
        sha256=sha256(path),
        size_bytes=path.stat().st_size,
        role=role,
        backend=artifact.backend if artifact else None,
        precision=artifact.precision if artifact else None,
    )


def golden_output(artifact: Artifact) -> str:
    """Path in the bundle of an artifact's logits for the golden input."""
    return f"golden/{artifact.name}.npy"


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Writes bundle.json."""
    (root / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(root: Path, source: Path) -> Manifest:
    """The manifest of the bundle in folder `root`; `source` is how error messages call the bundle.

    Raises:
        UserError: there is none, it is of a newer format, or it lists files outside the bundle.
        CheckFailed: it is damaged.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise UserError(f"{source} holds no {MANIFEST}, so it is no bundle; give a folder that gcvit-edge quantize or export made")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{source} has bundle format {data.get('format_version')}, this gcvit-edge reads {FORMAT_VERSION}; update it")
        manifest = Manifest.model_validate(data)
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckFailed(f"{MANIFEST} of {source} is damaged: {str(error).splitlines()[0]}; get the bundle again") from error
    for file in manifest.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts or "\\" in file.path:
            raise UserError(f"{MANIFEST} of {source} lists the file {file.path!r}, which lies outside the bundle; do not use it")
    return manifest
