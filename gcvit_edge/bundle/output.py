"""Where a bundle is written: never half a bundle, never over something else."""

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gcvit_edge.bundle.manifest import MANIFEST
from gcvit_edge.errors import UserError


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
