"""Where a bundle is written: never half a bundle, never over something else."""

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gcvit_edge.bundle.manifest import MANIFEST
from gcvit_edge.errors import UserError
from gcvit_edge.paths import is_full, require_folder


@contextmanager
def staged_bundle(output: Path, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `output` (zipped, if that ends in .zip) when the body ends well, and vanishes when it does
    not: there is never half a bundle.

    It lies beside `output`, or in it if that is an empty folder: one that is mounted, or the current one, cannot be replaced.

    Raises:
        UserError: as `check_output`, before the body and after it; or the folder cannot be written.
    """
    check_output(output, force)
    output = output.resolve() if output.is_symlink() else output  # what it links to is replaced, not the link
    zipped = output.suffix == ".zip"
    filled = output.is_dir() and not any(output.iterdir()) and not zipped
    parent = output if filled else output.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=parent))
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(f"cannot write to {parent}: {error.strerror}; choose another --output") from error
    stage, replaced = scratch / "new", scratch / "old"
    try:
        stage.mkdir()
        yield stage
        if zipped:
            _zip(stage, scratch / "new.zip")
        check_output(output, force, scratch)  # again: the body took minutes
        if filled:
            _fill(output, stage)
        else:
            _replace(output, scratch / "new.zip" if zipped else stage, replaced)
    finally:
        if output.exists() or not replaced.exists():  # else even putting the old bundle back has failed
            shutil.rmtree(scratch, ignore_errors=True)


def _fill(folder: Path, stage: Path) -> None:
    """Moves everything from `stage` into `folder`, the manifest last, without which it is no bundle; or nothing."""
    moves = [(path, folder / path.name) for path in sorted(stage.iterdir(), key=lambda path: path.name == MANIFEST)]
    try:
        for source, target in moves:
            source.rename(target)
    except BaseException:
        for source, target in reversed(moves):
            if target.exists():
                target.rename(source)
        raise


def _replace(output: Path, finished: Path, replaced: Path) -> None:
    """Renames `finished` to `output`, and what was there to `replaced`; or nothing."""
    if output.exists():
        output.rename(replaced)
    try:
        finished.rename(output)
    except BaseException:
        if replaced.exists():
            replaced.rename(output)
        raise


def _zip(root: Path, output: Path) -> None:
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(root).as_posix())


def _names_in_zip(path: Path) -> list[str]:
    """None, if it is no zip or a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return []


def check_output(output: Path, force: bool, scratch: Path | None = None) -> None:
    """Refuses an output that would overwrite something. scratch: a folder that may lie in it.

    Raises:
        UserError: `output` exists and is not an empty folder; with `force`, only if it is no bundle either, or cannot be replaced.
            Or a folder that it would be in is a file, or it links to nothing.
    """
    if not output.exists():
        if output.is_symlink():
            raise UserError(f"{output} links to {output.readlink()}, which does not exist (is a disk missing?); give another --output")
        require_folder(output.parent)
        return
    content = [path.name for path in output.iterdir() if path != scratch] if output.is_dir() else [output.name]
    if not content:
        return
    is_bundle = (output / MANIFEST).is_file() or MANIFEST in _names_in_zip(output)
    if is_bundle and not force:
        raise UserError(f"{output} exists and holds a bundle; give --force to replace it, or another --output")
    if is_bundle and (output.resolve() == Path.cwd() or output.is_mount()):
        raise UserError(f"{output} holds a bundle and is the current folder or mounted, so it cannot be replaced; give another --output")
    if not is_bundle and force:
        raise UserError(f"{output} exists and is not a bundle, so --force does not replace it; give another --output")
    if not is_bundle:
        held = f" and holds {min(content)}" if output.is_dir() else ""  # which may be hidden
        raise UserError(f"{output} exists{held}; give another --output")
