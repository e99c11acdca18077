"""Where a bundle is written: never half a bundle, never over something else."""

import os
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
    """A temporary folder that becomes `output` (zipped, if that ends in .zip) when the body ends well, and vanishes when it does
    not: there is never half a bundle.

    It lies beside `output`, or in it if that is a folder already. Such a folder is filled: where something is mounted, or a shell
    is in it, it cannot be replaced.

    Raises:
        UserError: as `check_output`, before the body and after it; or the folder cannot be written.
    """
    check_output(output, force)
    zipped = output.suffix == ".zip"
    filled = output.is_dir() and not zipped
    parent = output if filled else output.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=parent))
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror}; choose another --output") from error
    try:
        stage, replaced = scratch / "new", scratch / "old"
        stage.mkdir()
        yield stage
        if zipped:
            _zip(stage, scratch / "new.zip")
        check_output(output, force, scratch)  # again: the body took minutes
        if filled:
            replaced.mkdir()
            # without the manifest it is no bundle: that goes first, and comes last
            old, new = (sorted(_content(folder, scratch), key=lambda path: path.name == MANIFEST) for folder in (output, stage))
            _move([(path, replaced / path.name) for path in reversed(old)] + [(path, output / path.name) for path in new])
        else:
            old = [(output, replaced)] if output.exists() else []
            _move([*old, (scratch / "new.zip" if zipped else stage, output)])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _content(folder: Path, scratch: Path | None) -> list[Path]:
    return [path for path in folder.iterdir() if scratch is None or path.name != scratch.name]


def _move(moves: list[tuple[Path, Path]]) -> None:
    """Renames everything, in order, or nothing."""
    try:
        for source, target in moves:
            source.rename(target)
    except BaseException:
        for source, target in reversed(moves):
            if not os.path.lexists(source):
                target.rename(source)
        raise


def _zip(root: Path, output: Path) -> None:
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(root).as_posix())


def check_output(output: Path, force: bool, scratch: Path | None = None) -> None:
    """Refuses an output that would overwrite something. scratch: a folder that may lie in it.

    Raises:
        UserError: `output` exists and is not an empty folder; with `force`, only if it is no bundle either.
    """
    if not output.exists():
        return
    content = _content(output, scratch) if output.is_dir() else [output]
    if not content:
        return
    is_bundle = (output / MANIFEST).is_file() or (zipfile.is_zipfile(output) and MANIFEST in zipfile.ZipFile(output).namelist())
    if is_bundle and not force:
        raise UserError(f"{output} exists and holds a bundle; give --force to replace it, or another --output")
    if not is_bundle and force:
        raise UserError(f"{output} exists and is not a bundle, so --force does not replace it; give another --output")
    if not is_bundle:
        held = f" and holds {min(content).name}" if output.is_dir() else ""  # which may be hidden
        raise UserError(f"{output} exists{held}; give another --output")
