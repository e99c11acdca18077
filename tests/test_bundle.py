"""The bundle of a tiny network: what is in it, what opening and verifying refuse, and that there is never half a one."""

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CLASSES, EVALUATION_IMAGES, Tiny, make_tiny

import gcvit_edge
from gcvit_edge import Bundle, open_bundle
from gcvit_edge.data import Preprocessing, find_images, read_image, read_preprocessing
from gcvit_edge.errors import CheckFailed, UserError, WrongAnswer

FILES = [
    "README.md", "bundle.json", "golden/input.npy", "golden/onnx.int8.npy", "labels.txt", "model.int8.onnx", "preprocessor_config.json",
    "report.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def bundle(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("made") / "bundle"
    return quantize(tiny, output)


def quantize(tiny: Tiny, output: Path, **options: Any) -> Bundle:
    return gcvit_edge.quantize(
        str(tiny.recipe), tiny.model, calib=tiny.calib, eval=tiny.evaluation, backends=["onnx"], output=output, **options
    )


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.root, tmp_path / "copy"))


def zipped(root: Path, archive: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(archive, "w", method) as out:
        for name in listing(root):
            out.write(root / name, name)
    return archive


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


def replace_golden(root: Path, logits: np.ndarray) -> None:
    np.save(root / "changed.npy", logits)
    replace_listed(root, "golden/onnx.int8.npy", (root / "changed.npy").read_bytes())
    (root / "changed.npy").unlink()


# what is in it


def test_layout(bundle: Bundle) -> None:
    assert listing(bundle.root) == FILES
    assert (bundle.root / "labels.txt").read_text() == "blue\ngreen\nred\nyellow\n"
    assert read_preprocessing(bundle.root / "preprocessor_config.json") == Preprocessing(size=(64, 64), resize=73)
    inputs, logits = np.load(bundle.root / "golden" / "input.npy"), np.load(bundle.root / "golden" / "onnx.int8.npy")
    assert inputs.dtype == logits.dtype == np.float32
    assert inputs.shape[1:] == (3, 64, 64)
    assert logits.shape == (len(inputs), 4)


def test_manifest_lists_every_file_with_its_hash(bundle: Bundle) -> None:
    data = json.loads((bundle.root / "bundle.json").read_text())
    assert data["format_version"] == 1
    assert sorted(file["path"] for file in data["files"]) == [name for name in FILES if name != "bundle.json"]
    for file in data["files"]:
        content = (bundle.root / file["path"]).read_bytes()
        assert (file["sha256"], file["size_bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    roles = {file["path"]: file["role"] for file in data["files"]}
    assert roles["model.int8.onnx"] == "artifact"
    assert roles["golden/input.npy"] == "golden"
    assert roles["README.md"] == "card"
    assert data["recipe"]["name"] == "tiny"
    assert "max_drop: 50" in data["recipe"]["text"]
    assert data["requirements"]["onnx"]["minimum_version"] == "1.23.0"
    assert data["tools"]["gcvit-edge"] == gcvit_edge.__version__
    assert {"onnx", "onnxruntime", "torch", "python"} <= set(data["tools"])
    assert data["within_limits"] is True
    assert data["model"]["labels"]["names"] == list(CLASSES)
    assert data["results"] == bundle.report["artifacts"]


def test_no_machine_paths_inside(bundle: Bundle, tiny: Tiny) -> None:
    for name in FILES:
        content = (bundle.root / name).read_bytes()
        assert str(bundle.root.parent).encode() not in content, name
        assert str(tiny.calib.parent).encode() not in content, name


def test_report(bundle: Bundle) -> None:
    report = json.loads((bundle.root / "report.json").read_text())
    assert {"model", "recipe", "images", "float", "artifacts", "seconds"} <= set(report)
    assert (report["model"], report["recipe"], report["images"]) == ("gcvit_custom", "tiny", EVALUATION_IMAGES)
    assert set(report["float"]) == {"top1", "top5"}
    assert report["float"]["top1"] > 0.9
    assert report["float"]["top5"] == 1.0  # four classes
    assert all(isinstance(seconds, float) and seconds >= 0 for seconds in report["seconds"].values())
    assert any(seconds > 0 for seconds in report["seconds"].values())
    (entry,) = report["artifacts"]
    assert (entry["backend"], entry["precision"], entry["file"]) == ("onnx", "int8", "model.int8.onnx")
    assert entry["size_bytes"] == (bundle.root / "model.int8.onnx").stat().st_size
    assert entry["size_bytes"] < 0.5 * entry["float_size_bytes"]
    assert entry["top1"] == pytest.approx(report["float"]["top1"] - entry["drop_points"] / 100, abs=1e-5)
    low, high = entry["drop_ci95"]
    assert low < entry["drop_points"] < high
    assert 0.9 < entry["agreement"] <= 1
    assert 15 < entry["sqnr_db"] < 80
    latency = entry["latency_ms"]
    assert set(latency) == {"p50", "p90", "p99"}
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    assert entry["load_ms"] > 0
    assert entry["threads"] >= 1
    assert 20 < entry["peak_rss_mb"] < 2000


def test_report_is_what_the_artifact_does(bundle: Bundle, tiny: Tiny) -> None:
    images = find_images(tiny.evaluation, "evaluation")
    run = bundle.runner("onnx", threads=1)
    right = [
        CLASSES[run(read_image(tiny.evaluation / file, bundle.info.preprocessing))[0].argmax()] == name
        for file, name in zip(images.files, images.classes, strict=True)
    ]
    assert np.mean(right) == pytest.approx(bundle.report["artifacts"][0]["top1"])


def test_model_card_shows_the_measured_numbers(bundle: Bundle) -> None:
    card = (bundle.root / "README.md").read_text()
    entry = bundle.report["artifacts"][0]
    assert f"{entry['top1']:.2%}" in card or f"{100 * entry['top1']:.2f}" in card
    assert "onnx" in card.lower()
    assert bundle.info.origin.licence in card
    assert "{{" not in card
    assert "{%" not in card


def test_onnx_metadata_carries_labels_and_preprocessing(bundle: Bundle) -> None:
    import onnx

    model = onnx.load(bundle.root / "model.int8.onnx")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["names"]) == {"0": "blue", "1": "green", "2": "red", "3": "yellow"}
    assert Preprocessing.model_validate_json(properties["preprocessing"]) == Preprocessing(size=(64, 64), resize=73)
    assert properties["model"] == "gcvit_custom"
    assert properties["license"] == bundle.info.origin.licence


def test_artifact_holds_integers(bundle: Bundle) -> None:
    import onnx

    operators = [node.op_type for node in onnx.load(bundle.root / "model.int8.onnx").graph.node]
    # of four local blocks, a global one, and the MBConvs but for those of queries that no block reads
    assert operators.count("MatMulInteger") == 4 * 6 + 5 + 6
    assert operators.count("DequantizeLinear") > 10


def test_opened_bundle(bundle: Bundle) -> None:
    opened = open_bundle(bundle.root)
    (artifact,) = opened.artifacts
    assert (artifact.name, artifact.path.name) == ("onnx.int8", "model.int8.onnx")
    assert artifact.files == (bundle.root / "model.int8.onnx",)
    assert opened.artifact("onnx", "int8") == opened.artifact() == artifact
    with pytest.raises(UserError, match=r"unknown backend of this bundle 'onnxx'; did you mean 'onnx'\? known: onnx"):
        opened.artifact("onnxx")
    with pytest.raises(UserError, match=r"unknown artifact of this bundle 'onnx\.float'"):
        opened.artifact("onnx", "float")


@pytest.mark.parametrize("colour", CLASSES)
def test_predict(bundle: Bundle, tiny: Tiny, colour: str) -> None:
    ((first, *rest),) = bundle.predict([tiny.image(colour)], top=3)
    assert first[0] == colour
    assert first[1] > 0.9
    assert len(rest) == 2
    probabilities = [p for _, p in bundle.predict([tiny.image(colour)])[0]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)


# verifying


def test_verify_passes(bundle: Bundle) -> None:
    ((name, parity),) = bundle.verify().items()
    assert name == "onnx.int8"
    assert parity.sqnr_db > 60  # on the machine that made it
    assert parity.minimum_db == 20
    assert parity.same_top1 == 1


def test_verify_finds_one_changed_byte(copy: Path) -> None:
    data = bytearray((copy / "model.int8.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.int8.onnx").write_bytes(data)
    with pytest.raises(CheckFailed, match=rf"model\.int8\.onnx was changed .* got {len(data)} bytes with sha256 .* expected {len(data)} "):
        open_bundle(copy).verify()


@pytest.mark.parametrize("name", [name for name in FILES if name != "bundle.json"])
def test_verify_finds_a_change_of_any_file(name: str, copy: Path) -> None:
    with (copy / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(CheckFailed, match=f"^{re.escape(name)} was changed"):
        open_bundle(copy).verify()


def test_verify_finds_swapped_labels(copy: Path) -> None:
    (copy / "labels.txt").write_text("green\nblue\nred\nyellow\n")
    with pytest.raises(CheckFailed, match=r"labels\.txt was changed"):
        open_bundle(copy).verify()


@pytest.mark.parametrize("name", ["model.int8.onnx", "golden/input.npy", "report.json"])
def test_verify_finds_a_missing_file(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckFailed, match=f"{re.escape(name)} is missing from the bundle"):
        open_bundle(copy).verify()


def test_verify_finds_an_extra_file(copy: Path) -> None:
    (copy / "golden" / "extra.bin").write_bytes(b"x")
    with pytest.raises(CheckFailed, match=r"files that bundle\.json does not list: golden/extra\.bin"):
        open_bundle(copy).verify()


def test_verify_finds_a_wrong_golden_output(copy: Path) -> None:
    logits = np.load(copy / "golden" / "onnx.int8.npy")
    replace_golden(copy, np.roll(logits, 1, axis=1))
    with pytest.raises(WrongAnswer, match=r"onnx\.int8 gives other logits than when it was made: to -?\d+\.\d dB \(at least 20\)"):
        open_bundle(copy).verify()


def test_verify_allows_what_other_cpus_round(copy: Path) -> None:
    logits = np.load(copy / "golden" / "onnx.int8.npy")
    replace_golden(copy, logits * np.float32(1.01))  # 40 dB
    (parity,) = open_bundle(copy).verify().values()
    assert parity.sqnr_db == pytest.approx(40, abs=0.2)


def test_verify_refuses_answers_that_are_no_numbers(copy: Path) -> None:
    logits = np.load(copy / "golden" / "onnx.int8.npy")
    logits[0, 0] = np.nan
    replace_golden(copy, logits)
    with pytest.raises(CheckFailed, match=r"onnx\.int8"):
        open_bundle(copy).verify()


def test_verify_finds_an_artifact_that_does_not_load(copy: Path) -> None:
    replace_listed(copy, "model.int8.onnx", b"no model at all")
    with pytest.raises(CheckFailed, match=r"model\.int8\.onnx does not run in onnx \(process ended with 1\)"):
        open_bundle(copy).verify()


def test_verify_finds_golden_tensors_that_are_not_listed(copy: Path) -> None:
    (copy / "golden" / "onnx.int8.npy").unlink()
    edit_manifest(copy, lambda data: data.update(files=[f for f in data["files"] if f["path"] != "golden/onnx.int8.npy"]))
    with pytest.raises((CheckFailed, UserError), match="golden"):
        open_bundle(copy).verify()


# opening


@pytest.mark.parametrize("path", ["../outside.bin", "golden/../../outside.bin", "/etc/hostname", "..\\outside.bin"])
def test_paths_that_lead_outside_are_refused(path: str, copy: Path) -> None:
    edit_manifest(copy, lambda data: data["files"][0].update(path=path))
    with pytest.raises(UserError, match="lies outside the bundle; do not use it"):
        open_bundle(copy)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"format_version": 1}', b'\xff\xfe{"format_version": 1}', b'{"format_version": 1, "files": 3}']
)
def test_damaged_manifest(content: bytes, copy: Path) -> None:
    (copy / "bundle.json").write_bytes(content)
    with pytest.raises(UserError, match=r"bundle\.json is damaged: .*; get the bundle again"):
        open_bundle(copy)


def test_unknown_manifest_key(copy: Path) -> None:
    edit_manifest(copy, lambda data: data.update(surprise=1))
    with pytest.raises(UserError, match="is damaged"):
        open_bundle(copy)


@pytest.mark.parametrize("version", [2, 99])
def test_newer_format(version: int, copy: Path) -> None:
    edit_manifest(copy, lambda data: data.update(format_version=version, new_key="of the new format"))
    with pytest.raises(UserError, match=f"has bundle format {version}, this gcvit-edge reads 1; update it"):
        open_bundle(copy)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is no bundle; give a folder or zip"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no bundle\.json, so it is no bundle"):
        open_bundle(tmp_path)
    (tmp_path / "file").write_text("hello")
    with pytest.raises(UserError, match="file is no bundle"):
        open_bundle(tmp_path / "file")


# zip


def test_zipped_bundle_opens_verifies_and_predicts_alike(bundle: Bundle, tiny: Tiny, tmp_path: Path) -> None:
    opened = open_bundle(zipped(bundle.root, tmp_path / "bundle.zip"))
    assert opened.manifest == bundle.manifest
    assert opened.verify()["onnx.int8"].sqnr_db > 60
    images = [tiny.image("red"), tiny.image("blue")]
    assert opened.predict(images) == bundle.predict(images)


def test_truncated_zip(bundle: Bundle, tmp_path: Path) -> None:
    file = zipped(bundle.root, tmp_path / "bundle.zip")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"bundle\.zip is no bundle"):
        open_bundle(file)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_with_damaged_content(method: int, bundle: Bundle, tmp_path: Path) -> None:
    file = zipped(bundle.root, tmp_path / "bundle.zip", method)
    with zipfile.ZipFile(file) as archive:
        entry = archive.getinfo("model.int8.onnx")
    data = bytearray(file.read_bytes())
    middle = entry.header_offset + entry.compress_size // 2
    data[middle : middle + 400] = b"\xff" * 400
    file.write_bytes(data)
    with pytest.raises((UserError, CheckFailed), match=r"bundle\.zip"):
        open_bundle(file).verify()


def test_zip_members_stay_inside(bundle: Bundle, tmp_path: Path) -> None:
    file = zipped(bundle.root, tmp_path / "bundle.zip")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../../escaped.txt", "x")
    opened = open_bundle(file)
    assert not list(opened.root.parent.glob("escaped.txt"))
    with pytest.raises(CheckFailed, match=r"does not list: escaped\.txt"):
        opened.verify()


# writing: never half a bundle


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    """Replaces the slow steps by the artifact that is there already; planning, staging and packing are real."""
    from gcvit_edge.artifact import Artifact
    from gcvit_edge.pipeline import Made

    def make(job: Any, name: str, calibrated: Any, held_out: Any, work: Path, stage: Path, steps: Any) -> Made:
        path = Path(shutil.copy(bundle.root / "model.int8.onnx", stage))
        return Made(Artifact("onnx", "float", path, (path,)), Artifact("onnx", "int8", path, (path,)))

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
