"""An opened bundle: its artifacts, what they predict, whether they are what was shipped."""

import json
import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gcvit_edge.artifact import Artifact
from gcvit_edge.backends import Runner, load_backend, package_version
from gcvit_edge.bundle.manifest import (
    GOLDEN_IMAGE,
    GOLDEN_INPUT,
    GOLDEN_PREPROCESSED,
    MANIFEST,
    File,
    Manifest,
    golden_output,
    read_manifest,
    sha256,
)
from gcvit_edge.cpus import default_threads
from gcvit_edge.data import read_image
from gcvit_edge.errors import CheckFailed, UserError, WrongAnswer, unknown_name
from gcvit_edge.measurement.parity import Parity, check_parity
from gcvit_edge.model.info import ModelInfo
from gcvit_edge.paths import is_full
from gcvit_edge.targets import Case
from gcvit_edge.targets.local import Session

_MAX_LEVELS = 1.5  # of 255: resampling may round otherwise
_MAX_MANIFEST_BYTES = 2**24  # labels of 20,000 classes take half a million
_MOST_UNPACKED = 100  # times what is packed: weights are hardly smaller in a zip


class Bundle:
    """An opened bundle. path: the folder or zip. root: the folder of its files. manifest: the validated bundle.json. left_out: files of
    a zip that the manifest does not list, so they were not unpacked."""

    def __init__(self, path: Path, root: Path, manifest: Manifest, left_out: Sequence[str] = ()) -> None:
        self.path, self.root, self.manifest, self._left_out = path, root, manifest, left_out

    @property
    def info(self) -> ModelInfo:
        """The model: name, shape, labels, preprocessing, origin and licence."""
        return self.manifest.model

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of report.json.

        Raises:
            CheckFailed: it is missing or damaged.
        """
        with _reading("report.json"):
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
        """The first artifact of a backend and precision; None is any, float only where there is nothing else: it is there to compare with.

        Raises:
            UserError: the bundle has none; the message lists those that it has.
        """
        found = [a for a in self.artifacts if backend in (None, a.backend) and precision in (None, a.precision)]
        if found:
            return min(found, key=lambda artifact: artifact.precision == "float")
        if precision is None and backend is not None:
            raise unknown_name("backend of this bundle", backend, dict.fromkeys(a.backend for a in self.artifacts))
        raise unknown_name("artifact of this bundle", f"{backend or 'any'}.{precision}", [a.name for a in self.artifacts])

    def runner(self, backend: str | None = None, threads: int | None = None) -> Runner:
        """Loads an artifact in this process: (1, C, H, W) float32 -> (1, classes) float32 logits.

        Raises:
            UserError: the bundle has none of this backend.
            CheckFailed: as `verify_artifact`.
        """
        artifact = self.artifact(backend)
        self.verify_artifact(artifact)
        return load_backend(artifact.backend).load(artifact.path, threads or default_threads())

    def predict(self, images: list[Path], backend: str | None = None, top: int = 5) -> list[list[tuple[str, float]]]:
        """The `top` most probable classes of each image file, with softmax probabilities.

        Raises:
            UserError: an image is missing or does not decode, `top` is below 1, or the bundle has no artifact of that backend.
            CheckFailed: as `verify_artifact`.
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
        """The network inputs (N, C, H, W) whose logits are golden.

        Raises:
            CheckFailed: their file is missing or damaged.
        """
        return self._tensor(GOLDEN_INPUT)

    def golden_logits(self, artifact: Artifact) -> NDArray[np.float32]:
        """The logits (N, classes) that an artifact of the bundle gave for them when it was made.

        Raises:
            CheckFailed: their file is missing or damaged.
        """
        return self._tensor(golden_output(artifact))

    @property
    def has_golden_image(self) -> bool:
        """Whether there is a picture to check preprocessing by; bundles from before there was one have none."""
        return any(file.path == GOLDEN_IMAGE for file in self.manifest.files)

    def measured_db(self, artifact: Artifact) -> float | None:
        """SQNR of an artifact's logits against float's on the evaluation images, when it was made; None for float itself."""
        for result in self.manifest.results:
            if (result["backend"], result["precision"]) == (artifact.backend, artifact.precision):
                return result.get("sqnr_db")
        return None

    def parity(self, case: Case, logits: NDArray[np.float32]) -> Parity:
        """Compares the logits (N, classes) that a case gives for the golden input with the golden ones.

        Raises:
            CheckFailed: they have another shape, or the golden ones are missing or damaged.
        """
        golden = case.golden or case.artifact
        computed_in = case.arithmetic or case.artifact.precision
        is_same = golden is case.artifact and computed_in == golden.precision  # else it has the noise of both
        return check_parity(
            logits, self.golden_logits(golden), golden.precision, None if is_same else computed_in, self.measured_db(golden)
        )

    def _tensor(self, name: str) -> NDArray[np.float32]:
        with _reading(name), (self.root / name).open("rb") as file:
            return np.lib.format.read_array(file)

    def verify(self) -> dict[str, Parity]:
        """`verify_content`, then `replay`: how each artifact, by name, reproduced its golden logits.

        Raises:
            CheckFailed: as these.
            WrongAnswer: an artifact gives other logits than it should.
        """
        self.verify_content()
        replays = self.replay()
        if wrong := wrong_answers(replays):
            raise wrong
        return replays

    def verify_content(self) -> None:
        """Recomputes every hash and preprocesses the golden image.

        Raises:
            CheckFailed: a file is missing, changed or not listed, or preprocessing gives another input.
        """
        self._verify_files()
        self._verify_preprocessing()

    def replay(self) -> dict[str, Parity]:
        """How each artifact, by name, reproduces its golden logits in its runtime, in a fresh process; also those that do not.

        Raises:
            CheckFailed: one does not run.
        """
        return {artifact.name: self._replay(artifact) for artifact in self.artifacts}

    def verify_artifact(self, artifact: Artifact) -> None:
        """Raises CheckFailed if a file of it is missing or was changed, of which runtimes say nothing that helps, or nothing at all."""
        for file in self.manifest.files:
            if self.root / file.path in artifact.files:
                self._verify_file(file)

    def _verify_files(self) -> None:
        listed = {MANIFEST}
        for file in self.manifest.files:
            listed.add(file.path)
            self._verify_file(file)
        unlisted = {GOLDEN_INPUT, *(golden_output(artifact) for artifact in self.artifacts)} - listed
        if unlisted:
            raise CheckFailed(f"bundle.json does not list {', '.join(sorted(unlisted))}, which every bundle has; get the bundle again")
        # linked folders too, which are not looked into
        held = {p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_symlink() or not p.is_dir()}
        extra = sorted(held.union(self._left_out) - listed)
        if extra:
            raise CheckFailed(f"the bundle holds files that bundle.json does not list: {', '.join(extra[:5])}; remove them")

    def _verify_file(self, file: File) -> None:
        path = self.root / file.path
        if not path.is_file():
            raise CheckFailed(f"{file.path} is missing from the bundle; get the bundle again")
        found = sha256(path)
        if found != file.sha256:
            raise CheckFailed(
                f"{file.path} was changed after the bundle was made: got {path.stat().st_size} bytes with sha256 {found[:12]}..., "
                f"expected {file.size_bytes} bytes with {file.sha256[:12]}...; get the bundle again (out of Git: with git lfs pull)"
            )

    def _verify_preprocessing(self) -> None:
        if not self.has_golden_image:
            return
        got, expected = read_image(self.root / GOLDEN_IMAGE, self.info.preprocessing), self._tensor(GOLDEN_PREPROCESSED)
        if got.shape != expected.shape:
            raise CheckFailed(f"{GOLDEN_PREPROCESSED} has shape {expected.shape}, expected {got.shape}; get the bundle again")
        std = np.array(self.info.preprocessing.std, np.float32)[:, None, None]
        levels = float(np.abs((got - expected) * std).max()) * 255
        if not levels <= _MAX_LEVELS:  # which NaN is not
            raise CheckFailed(
                f"{GOLDEN_IMAGE} preprocessed here differs from {GOLDEN_PREPROCESSED} by up to {levels:.0f} of 255 levels, "
                f"expected at most {_MAX_LEVELS}; Pillow is {package_version('pillow')} here"
            )

    def _replay(self, artifact: Artifact) -> Parity:
        with Session(artifact, threads=default_threads()) as session:
            return self.parity(Case(artifact, "cpu"), session.infer(self.golden_input(), lambda: None))


def wrong_answers(replays: dict[str, Parity]) -> WrongAnswer | None:
    """The error that names all artifacts that did not reproduce their golden logits; None if all did."""
    lines = [
        f"{name} gives other logits than when it was made: {parity.describe()}; its runtime on this machine computes it wrongly"
        for name, parity in replays.items()
        if not parity.passed
    ]
    return WrongAnswer("\n".join(lines)) if lines else None


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Raises CheckFailed where reading this file of the bundle fails."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckFailed(f"{name} is missing from the bundle; get the bundle again") from error
    except OSError as error:
        raise CheckFailed(f"{name} of the bundle cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, RecursionError) as error:
        raise CheckFailed(f"{name} of the bundle is damaged; get the bundle again (out of Git: with git lfs pull)") from error


def open_bundle(path: str | Path) -> Bundle:
    """Opens a bundle folder, or a zipped one (unpacked into a temporary folder that lives as long as the process).

    Hashes are not checked; call `verify()` for that.

    Raises:
        UserError: there is no bundle, or it is of a newer format.
        CheckFailed: its manifest or the zip is damaged, a file of the zip is larger than its manifest says, or all of it is packed too
            well to be weights.
        OSError: there is no room to unpack the zip.
    """
    path = Path(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return _unpack(path)
    if path.is_dir():
        if not (path / MANIFEST).is_file() and (inside := sorted(path.glob(f"*/{MANIFEST}"))):
            raise UserError(f"{path} is no bundle, but {inside[0].parent} is; give that")
        return Bundle(path, path, read_manifest(path, path))
    if path.is_file() and path.open("rb").read(2) == b"PK":
        raise CheckFailed(f"{path} is no whole zip file, as if it had been cut off on its way; get the bundle again")
    raise UserError(f"{path} is no bundle; give a folder or zip that gcvit-edge quantize or export made")


_unpacked: list[tempfile.TemporaryDirectory[str]] = []


def _unpack(path: Path) -> Bundle:
    folder = tempfile.TemporaryDirectory(prefix="gcvit-edge-")
    root = Path(folder.name)
    with ExitStack() as stack:
        stack.callback(folder.cleanup)  # unless all of it is there
        try:
            with zipfile.ZipFile(path) as archive:
                bundle = _extracted(archive, path, root)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError) as error:
            if isinstance(error, OSError) and is_full(error):
                raise  # nothing is wrong with the bundle
            raise CheckFailed(f"{path} is damaged ({error}); get the bundle again") from error
        stack.pop_all()
    _unpacked.append(folder)
    return bundle


def _extracted(archive: zipfile.ZipFile, path: Path, root: Path) -> Bundle:
    """Unpacks what the manifest lists.

    Raises:
        UserError: the bundle is in a folder of it.
        CheckFailed: a file is larger than listed, or packed so well that it holds no network: a small zip may hold more than a disk does.
    """
    names = archive.namelist()
    if MANIFEST not in names and (inside := sorted(name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(f"/{MANIFEST}"))):
        raise UserError(f"{path} holds a bundle in its folder {inside[0]}; zip what is in that folder, or unpack it and give the folder")
    _extract(archive, MANIFEST, _MAX_MANIFEST_BYTES, root)
    manifest = read_manifest(root, path)
    listed = {file.path: file.size_bytes for file in manifest.files}
    packed = path.stat().st_size  # not the sum of its entries, which may be the same bytes again and again
    if sum(listed.values()) > _MOST_UNPACKED * packed + _MAX_MANIFEST_BYTES:
        raise CheckFailed(f"{path} lists {sum(listed.values())} bytes and has {packed}, far too few for weights; get the bundle again")
    for name, size in listed.items():
        _extract(archive, name, size, root)
    others = [name for name in archive.namelist() if name not in {MANIFEST, *listed} and not name.endswith("/")]
    return Bundle(path, root, manifest, others)


def _extract(archive: zipfile.ZipFile, name: str, most: int, root: Path) -> None:
    """Unpacks a file of at most so many bytes. One that is missing is for `verify`."""
    if name not in archive.namelist():
        return
    found = archive.getinfo(name).file_size  # zipfile unpacks no more than that
    if found > most:
        raise CheckFailed(f"{name} in {archive.filename} has {found} bytes, expected at most {most}; get the bundle again")
    archive.extract(name, root)
