"""The bundle: a folder (or zip) with the artifacts of one model and all that an app needs to run and check them."""

import hashlib
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from gcvit_edge.artifact import Artifact, Precision
from gcvit_edge.backends import Runner, load_backend
from gcvit_edge.data import read_image
from gcvit_edge.errors import CheckFailed, UserError, WrongAnswer, unknown_name
from gcvit_edge.model.info import ModelInfo
from gcvit_edge.parity import Parity, check_parity
from gcvit_edge.targets.local import Session, default_threads

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
GOLDEN_INPUT = "golden/input.npy"

Role = Literal["artifact", "artifact_data", "golden", "labels", "preprocessing", "report", "card"]


class File(BaseModel):
    """One file of a bundle; path is relative to it, with forward slashes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    sha256: str
    size_bytes: int
    role: Role
    backend: str | None = None
    precision: Literal["float"] | Precision | None = None


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


@contextmanager
def staged_bundle(output: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` (zipped, if that ends in .zip) when the body ends well, and
    vanishes when it does not: there is never half a bundle.

    Raises:
        UserError: as `check_output`, or the folder of `output` cannot be written.
    """
    check_output(output, force)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise UserError(f"cannot write to {output.parent}: {error.strerror}; choose another --output") from error
    try:
        stage = scratch / "new"
        stage.mkdir()
        yield stage
        finished = stage
        if output.suffix == ".zip":
            finished = scratch / "new.zip"
            _zip(stage, finished)
        replaced = scratch / "old"
        if output.exists():
            output.rename(replaced)
        try:
            finished.rename(output)
        except BaseException:
            if replaced.exists():
                replaced.rename(output)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _zip(root: Path, output: Path) -> None:
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(root).as_posix())


def check_output(output: Path, force: bool) -> None:
    """Refuses an output that would overwrite something.

    Raises:
        UserError: `output` exists and is not an empty folder; with `force`, only if it is no bundle either.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    is_bundle = (output / MANIFEST).is_file() or (zipfile.is_zipfile(output) and MANIFEST in zipfile.ZipFile(output).namelist())
    if not force:
        raise UserError(
            f"{output} exists"
            + (" and holds a bundle; give --force to replace it, or another --output" if is_bundle else "; give another --output")
        )
    if not is_bundle:
        raise UserError(f"{output} exists and is not a bundle, so --force does not replace it; give another --output")


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


class Bundle:
    """An opened bundle. root: its folder. manifest: the validated bundle.json."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root, self.manifest = root, manifest

    @property
    def info(self) -> ModelInfo:
        """The model: name, shape, labels, preprocessing, origin and licence."""
        return self.manifest.model

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        return json.loads((self.root / "report.json").read_text(encoding="utf-8"))

    @property
    def artifacts(self) -> list[Artifact]:
        """All artifacts, in the order in which they were made."""
        files = self.manifest.files
        return [
            Artifact(
                main.backend or "",
                main.precision or "float",
                self.root / main.path,
                tuple(self.root / f.path for f in files
                      if (f.backend, f.precision) == (main.backend, main.precision) and f.role in ("artifact", "artifact_data")),
            )
            for main in files if main.role == "artifact"
        ]  # fmt: skip

    def artifact(self, backend: str | None = None, precision: str | None = None) -> Artifact:
        """The first artifact of a backend and precision; None is any.

        Raises:
            UserError: the bundle has none; the message lists those that it has.
        """
        for artifact in self.artifacts:
            if backend in (None, artifact.backend) and precision in (None, artifact.precision):
                return artifact
        if precision is None and backend is not None:
            raise unknown_name("backend of this bundle", backend, dict.fromkeys(a.backend for a in self.artifacts))
        raise unknown_name("artifact of this bundle", f"{backend or 'any'}.{precision}", [a.name for a in self.artifacts])

    def runner(self, backend: str | None = None, threads: int | None = None) -> Runner:
        """Loads an artifact in this process: (1, C, H, W) float32 -> (1, classes) float32 logits."""
        artifact = self.artifact(backend)
        return load_backend(artifact.backend).load(artifact.path, threads or default_threads())

    def predict(self, images: list[Path], backend: str | None = None, top: int = 5) -> list[list[tuple[str, float]]]:
        """The `top` most probable classes of each image file, with softmax probabilities.

        Raises:
            UserError: an image is missing or does not decode, `top` is below 1, or the bundle has no artifact of that backend.
        """
        if top < 1:
            raise UserError(f"top must be at least 1, got {top}")
        inputs = [read_image(Path(path), self.info.preprocessing) for path in images]
        run = self.runner(backend)
        predictions = []
        for image in inputs:
            logits = run(image)[0].astype(np.float64)
            probabilities = np.exp(logits - logits.max())
            probabilities /= probabilities.sum()
            order = np.argsort(-probabilities)[:top]
            predictions.append([(self.info.labels.names[i], float(probabilities[i])) for i in order])
        return predictions

    def golden_input(self) -> NDArray[np.float32]:
        """The network inputs (N, C, H, W) whose logits are golden."""
        return np.load(self.root / GOLDEN_INPUT)

    def golden_logits(self, artifact: Artifact) -> NDArray[np.float32]:
        """The logits (N, classes) that an artifact of the bundle gave for them when it was made."""
        return np.load(self.root / golden_output(artifact))

    def verify(self) -> dict[str, Parity]:
        """Recomputes every hash, then replays the golden tensors of every artifact in its runtime, in a fresh process.

        Returns how each artifact, by name, reproduced its golden logits.

        Raises:
            CheckFailed: a file is missing, changed or not listed.
            WrongAnswer: an artifact gives other logits than it should.
        """
        self._verify_files()
        return {artifact.name: self._replay(artifact) for artifact in self.artifacts}

    def _verify_files(self) -> None:
        listed = {MANIFEST}
        for file in self.manifest.files:
            path = self.root / file.path
            listed.add(file.path)
            if not path.is_file():
                raise CheckFailed(f"{file.path} is missing from the bundle; get the bundle again")
            found = sha256(path)
            if found != file.sha256:
                raise CheckFailed(
                    f"{file.path} was changed after the bundle was made: got {path.stat().st_size} bytes with sha256 {found[:12]}..., "
                    f"expected {file.size_bytes} bytes with {file.sha256[:12]}...; get the bundle again"
                )
        unlisted = {GOLDEN_INPUT, *(golden_output(artifact) for artifact in self.artifacts)} - listed
        if unlisted:
            raise CheckFailed(f"bundle.json does not list {', '.join(sorted(unlisted))}, which every bundle has; get the bundle again")
        extra = sorted({p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file()} - listed)
        if extra:
            raise CheckFailed(f"the bundle holds files that bundle.json does not list: {', '.join(extra[:5])}; remove them")

    def _replay(self, artifact: Artifact) -> Parity:
        with Session(artifact, threads=default_threads()) as session:
            got = session.infer(self.golden_input(), lambda: None)
        parity = check_parity(got, self.golden_logits(artifact), artifact.precision)
        if not parity.passed:
            raise WrongAnswer(
                f"{artifact.name} gives other logits than when it was made: {parity.describe()}; its runtime on this "
                "machine computes it wrongly"
            )
        return parity


def open_bundle(path: str | Path) -> Bundle:
    """Opens a bundle folder, or a zipped one (unpacked into a temporary folder that lives as long as the process).

    Hashes are not checked; call `verify()` for that.

    Raises:
        UserError: there is no bundle, or its manifest is not valid or of a newer format.
    """
    path = Path(path)
    if path.is_file() and zipfile.is_zipfile(path):
        root = _unpack(path)
    elif path.is_dir():
        root = path
    else:
        raise UserError(f"{path} is no bundle; give a folder or zip that gcvit-edge quantize or export made")
    manifest = root / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{path} holds no {MANIFEST}, so it is no bundle; give a folder that gcvit-edge quantize or export made")
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
        if isinstance(data, dict) and data.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path} has bundle format {data.get('format_version')}, this gcvit-edge reads {FORMAT_VERSION}; update it")
        parsed = Manifest.model_validate(data)
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{manifest} is damaged: {str(error).splitlines()[0]}; get the bundle again") from error
    for file in parsed.files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts or "\\" in file.path:
            raise UserError(f"{manifest} lists the file {file.path!r}, which lies outside the bundle; do not use it")
    return Bundle(root, parsed)


_unpacked: list[tempfile.TemporaryDirectory[str]] = []


def _unpack(path: Path) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="gcvit-edge-")
    _unpacked.append(folder)
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder.name)  # keeps members inside the folder
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged ({error}); get the bundle again") from error
    return Path(folder.name)
