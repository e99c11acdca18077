"""There is never half a bundle, nor one in the place of something else."""

import itertools
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from boards import need
from bundles import FILES, listing, quantize
from images import zipped
from tiny import Tiny

from gcvit_edge import Bundle, open_bundle, pipeline
from gcvit_edge.bundle.output import staged_bundle
from gcvit_edge.errors import CheckFailed, UserError


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    """Replaces the slow steps by the artifact that is there already; planning, staging and packing are real."""
    from gcvit_edge.artifact import Artifact
    from gcvit_edge.pipeline import Made

    def make(job: Any, calibrated: Any, work: Path, stage: Path, steps: Any) -> list[Made]:
        path = Path(shutil.copy(bundle.root / "model.int8.onnx", stage))
        return [Made(Artifact("onnx", "float", path, (path,)), Artifact("onnx", "int8", path, (path,)))]

    monkeypatch.setattr("gcvit_edge.pipeline._make", make)

    def measure(job: Any, made: list[Made], *_: Any) -> tuple[Any, Any]:
        golden = bundle.golden_logits(bundle.artifact("onnx"))
        return json.loads((bundle.root / "report.json").read_text()), {made[0].int8: golden}

    monkeypatch.setattr("gcvit_edge.pipeline._measure", measure)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when anything slow is started."""

    def fail(*_: Any) -> None:
        raise AssertionError("a long step was started")

    monkeypatch.setattr("gcvit_edge.pipeline._make", fail)


@pytest.mark.usefixtures("never")
def test_existing_bundle_is_not_overwritten(copy: Path, tiny: Tiny) -> None:
    before = {name: (copy / name).stat().st_mtime_ns for name in listing(copy)}
    with pytest.raises(UserError, match="copy exists and holds a bundle; give --force to replace it, or another --output"):
        quantize(tiny, copy)
    assert {name: (copy / name).stat().st_mtime_ns for name in listing(copy)} == before


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_bundle_is_never_replaced(force: bool, tiny: Tiny, tmp_path: Path) -> None:
    folder, file = tmp_path / "photos", tmp_path / "notes.zip"
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"precious")
    file.write_bytes(b"precious too")
    message = "exists and is not a bundle, so --force does not replace it" if force else r"exists( and holds holiday\.jpg)?; give another"
    for output in (folder, file):
        with pytest.raises(UserError, match=message):
            quantize(tiny, output, force=force)
    assert (folder / "holiday.jpg").read_bytes() == b"precious"
    assert file.read_bytes() == b"precious too"
    assert listing(tmp_path) == ["notes.zip", "photos/holiday.jpg"]


@pytest.mark.usefixtures("quick")
def test_force_replaces_a_bundle(copy: Path, tiny: Tiny) -> None:
    (copy / "stale.txt").write_text("of the old bundle")
    made = quantize(tiny, copy, force=True)
    assert made.root == copy
    assert listing(copy) == FILES
    assert made.verify()["onnx.int8"].sqnr_db > 60
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.usefixtures("quick")
def test_what_a_link_leads_to_is_replaced(copy: Path, tiny: Tiny, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(copy)
    (copy / "stale.txt").write_text("of the old bundle")
    quantize(tiny, link, force=True)
    assert link.is_symlink()
    assert listing(copy) == FILES


def test_a_link_to_nothing_is_no_output(tmp_path: Path) -> None:
    """As to a disk that is missing: found before the work, not after it."""
    for name in ("link", "link.zip"):
        (tmp_path / name).symlink_to("/nowhere/bundle")
        for force in (False, True):
            with (
                pytest.raises(UserError, match=r"link.* links to /nowhere/bundle, which does not exist .*; give another --output"),
                staged_bundle(tmp_path / name, force),
            ):
                pass


@pytest.mark.usefixtures("quick")
def test_empty_folder_is_a_fine_output(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o750)
    assert listing(quantize(tiny, tmp_path / "out").root) == FILES
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.usefixtures("quick")
def test_the_current_folder_is_a_fine_output(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert quantize(tiny, Path(".")).verify()
    assert listing(Path(".")) == listing(tmp_path / "out") == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="out exists and holds a bundle"):
        quantize(tiny, Path("."))
    with pytest.raises(UserError, match="out holds a bundle and is the current folder or mounted, so it cannot be replaced"):
        quantize(tiny, Path("."), force=True)
    assert open_bundle(Path(".")).verify()


@pytest.mark.usefixtures("quick")
def test_a_mounted_folder_is_a_fine_output(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path / "out"], capture_output=True)
    need(mounted.returncode == 0, "the right to mount a tmpfs")
    try:
        assert quantize(tiny, tmp_path / "out").verify()
        with pytest.raises(UserError, match="current folder or mounted, so it cannot be replaced"):
            quantize(tiny, tmp_path / "out", force=True)
        assert listing(tmp_path) == [f"out/{name}" for name in FILES]
    finally:
        subprocess.run(["umount", tmp_path / "out"], check=True)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("output", ["out", "out.zip", "new", "new.zip"])
def test_what_comes_while_it_runs_is_not_replaced(output: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / output if output == "new.zip" else tmp_path / output / "README.md"
    if output.startswith("out"):
        (tmp_path / output).mkdir()

    def meanwhile(*arguments: Any) -> None:
        pack(*arguments)
        file.parent.mkdir(exist_ok=True)
        file.write_text("precious")

    pack = pipeline.pack
    monkeypatch.setattr(pipeline, "pack", meanwhile)
    with pytest.raises(UserError, match=f"{output} exists( and holds README.md)?; give another --output"):
        quantize(tiny, tmp_path / output)
    assert file.read_text() == "precious"
    assert listing(tmp_path) == [str(file.relative_to(tmp_path))]


@pytest.mark.usefixtures("never")
def test_what_a_killed_run_left_is_named(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out" / ".out.partial-x").mkdir(parents=True)
    with pytest.raises(UserError, match=r"out exists and holds \.out\.partial-x; give another --output"):
        quantize(tiny, tmp_path / "out")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("output", "option"), [("out", True), ("out.zip", False), ("out.zip", True)])
def test_zip_output(output: str, option: bool, tiny: Tiny, tmp_path: Path) -> None:
    made = quantize(tiny, tmp_path / output, zip=option)
    assert [path.name for path in tmp_path.iterdir()] == ["out.zip"]
    assert sorted(zipfile.ZipFile(tmp_path / "out.zip").namelist()) == FILES
    assert made.predict([tiny.image("green")])[0][0][0] == "green"
    with pytest.raises(UserError, match=r"out\.zip exists and holds a bundle"):
        quantize(tiny, tmp_path / output, zip=option)
    assert quantize(tiny, tmp_path / output, zip=option, force=True).verify()


@pytest.mark.usefixtures("quick")
def test_missing_parents_are_made(tiny: Tiny, tmp_path: Path) -> None:
    assert listing(quantize(tiny, tmp_path / "a" / "b" / "out").root) == FILES


@pytest.mark.usefixtures("never")
def test_output_that_cannot_be_written(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write to .*file: .*; choose another --output"):
        quantize(tiny, tmp_path / "file" / "bundle")
    assert listing(tmp_path) == ["file"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckFailed, RuntimeError])
@pytest.mark.parametrize("step", ["decode_images", "_measure", "pack"])
def test_failed_run_leaves_nothing(
    step: str, error: type[BaseException], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def stop(*_: Any, **__: Any) -> None:
        raise error("stopped")

    monkeypatch.setattr(f"gcvit_edge.pipeline.{step}", stop)
    with pytest.raises(error, match="stopped"):
        quantize(tiny, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
    assert list(temporary.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_failed_replacement_keeps_the_old_bundle(copy: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gcvit_edge.pipeline.pack", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny, copy, force=True)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    assert open_bundle(copy).verify()


@pytest.mark.parametrize("place", ["folder", "zip", "empty"])
def test_a_failure_at_the_last_moment_changes_nothing(place: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = {"folder": copy, "zip": zipped(copy, tmp_path / "copy.zip"), "empty": tmp_path / "empty"}[place]
    (tmp_path / "empty").mkdir()
    new = Path(shutil.copytree(copy, tmp_path / "to come"))
    (new / "labels.txt").write_text("of the new bundle")
    before, rename = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}, Path.rename
    for failing in range(len(os.listdir(copy)) if place == "empty" else 2):
        count = itertools.count()

        def counted(self: Path, target: Path, count: Iterator[int] = count, failing: int = failing) -> Path:
            # a bundle is there as a whole, or none
            assert place == "zip" or not (output / "bundle.json").exists() or set(FILES) <= set(listing(output))
            if next(count) == failing:
                raise OSError("disk is gone")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", counted)
        with pytest.raises(OSError, match="disk is gone"), staged_bundle(output, force=True) as stage:
            shutil.copytree(new, stage, dirs_exist_ok=True)
        assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == before


def test_what_cannot_be_put_back_is_kept(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", broken)
        return rename(self, target)

    def broken(self: Path, target: Path) -> Path:
        raise OSError("disk is gone")

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(OSError, match="disk is gone"), staged_bundle(copy, force=True) as stage:
        (stage / "labels.txt").write_text("of the new bundle")
    (left,) = copy.parent.glob(".copy.partial-*/old")
    assert open_bundle(left).verify()
