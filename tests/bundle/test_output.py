"""There is never half a bundle, nor one in the place of something else."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from bundles import FILES, listing, quantize
from tiny import Tiny

from gcvit_edge import Bundle, open_bundle
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
    monkeypatch.setattr("gcvit_edge.pipeline._measure", lambda *_: json.loads((bundle.root / "report.json").read_text()))


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
    message = "exists and is not a bundle, so --force does not replace it" if force else "exists; give another --output"
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
def test_empty_folder_is_a_fine_output(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert listing(quantize(tiny, tmp_path / "out").root) == FILES


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


@pytest.mark.usefixtures("quick")
def test_replacement_that_fails_at_the_last_moment_keeps_the_old_bundle(copy: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, renamed = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        renamed.append(target)
        if len(renamed) == 2:  # the old bundle is out of the way, the new one not yet there
            raise OSError("disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk is gone"):
        quantize(tiny, copy, force=True)
    monkeypatch.undo()
    assert copy.is_dir(), "the old bundle is gone, and the new one is not there"
