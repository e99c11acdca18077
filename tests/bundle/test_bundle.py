"""What is in a bundle, and what verifying finds."""

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from bundles import FILES, edit_manifest, listing, replace_golden, replace_listed
from tiny import CLASSES, EVALUATION_IMAGES, Tiny

import gcvit_edge
from gcvit_edge import Bundle, export_float, open_bundle
from gcvit_edge.bundle.bundle import wrong_answers
from gcvit_edge.data import Preprocessing, find_images, read_image, read_preprocessing
from gcvit_edge.errors import CheckFailed, UserError, WrongAnswer
from gcvit_edge.measurement.parity import Parity
from gcvit_edge.model.info import NVLABS_LICENCE, UNKNOWN_LICENCE
from gcvit_edge.report.card import model_card
from gcvit_edge.training.job import OWN_LICENCE

# what is in it


def test_layout(bundle: Bundle) -> None:
    assert listing(bundle.root) == FILES
    assert (bundle.root / "labels.txt").read_text() == "blue\ngreen\nred\nyellow\n"
    assert read_preprocessing(bundle.root / "preprocessor_config.json") == Preprocessing(size=(64, 64), resize=73)
    inputs, logits = np.load(bundle.root / "golden" / "input.npy"), np.load(bundle.root / "golden" / "onnx.int8.npy")
    assert inputs.dtype == logits.dtype == np.float32
    assert inputs.shape[1:] == (3, 64, 64)
    assert logits.shape == (len(inputs), 4)


def test_onnx_runtime_by_its_other_name(weights: Path, tmp_path: Path, onnxruntime_gpu: str) -> None:
    made = export_float(weights=str(weights), backends=["onnx"], output=tmp_path / "bundle", threads=1)
    assert made.manifest.tools["onnxruntime"] == onnxruntime_gpu


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


def test_model_card_names_the_precision(bundle: Bundle) -> None:
    (entry,) = bundle.report["artifacts"]
    half = replace(bundle.artifact(), precision="fp16")
    report = bundle.report | {"artifacts": [entry | {"precision": "fp16"}]}
    card = model_card(bundle.info, report, {"model.fp16.onnx": half}, bundle.manifest.requirements)
    assert card.startswith("---\nlibrary_name: ")
    assert "\ntags: [gcvit, image-classification, fp16]\n" in card
    assert "| ms p50, FP16 / float |" in card
    assert "int8" not in card.lower()


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("MIT", {"license": "mit"}),
        (NVLABS_LICENCE, {"license": "cc-by-nc-sa-4.0"}),
        (UNKNOWN_LICENCE, {"license": "unknown"}),
        ("MIT OR Apache-2.0", {"license": "other", "license_name": "MIT OR Apache-2.0"}),
        ("Non-commercial use only", {"license": "other", "license_name": "Non-commercial use only"}),
        (OWN_LICENCE, {"license": "other", "license_name": OWN_LICENCE}),
        ('CC BY 4.0, "as is"', {"license": "other", "license_name": 'CC BY 4.0, "as is"'}),
    ],
)
def test_metadata_of_the_card_says_the_licence(licence: str, said: dict[str, str], bundle: Bundle) -> None:
    origin = bundle.info.origin.model_copy(update={"licence": licence})
    card = model_card(bundle.info.model_copy(update={"origin": origin}), bundle.report, {}, bundle.manifest.requirements)
    described = yaml.safe_load(card.split("---")[1])
    assert {key: value for key, value in described.items() if key.startswith("license")} == said


def test_the_card_lists_what_ships(weights: Path, tmp_path: Path) -> None:
    made = export_float(weights=str(weights), backends=["onnx", "openvino"], output=tmp_path / "bundle", threads=1)
    rows = [line for line in (made.root / "README.md").read_text().splitlines() if line.startswith(("| onnx", "| openvino"))]
    assert [row.split("|")[3].strip(" `") for row in rows] == ["model.float.onnx", "openvino/model.float.xml"]


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

    graph = onnx.load(bundle.root / "model.int8.onnx").graph
    # of four local blocks, a global one, the MBConvs but for those of queries that no block reads, and four convolutions
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 4 * 6 + 5 + 6 + 4
    in_integers = sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in graph.initializer)
    assert in_integers > 4 * 6 + 5 + 6 + 4 + 10  # gates and position biases too


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
    assert parity.minimum_db == max(20, bundle.manifest.results[0]["sqnr_db"] - 6)
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


@pytest.mark.parametrize("kind", ["folder", "nothing", "pipe"])
def test_verify_finds_what_is_no_file(kind: str, copy: Path, tmp_path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(copy / "more")
    else:
        (tmp_path / "folder").mkdir()
        (copy / "more").symlink_to(tmp_path / kind)
    with pytest.raises(CheckFailed, match=r"files that bundle\.json does not list: more"):
        open_bundle(copy).verify()


def test_verify_finds_an_extra_file(copy: Path) -> None:
    (copy / "golden" / "extra.bin").write_bytes(b"x")
    with pytest.raises(CheckFailed, match=r"files that bundle\.json does not list: golden/extra\.bin"):
        open_bundle(copy).verify()


def test_verify_finds_a_wrong_golden_output(copy: Path) -> None:
    logits = np.load(copy / "golden" / "onnx.int8.npy")
    replace_golden(copy, np.roll(logits, 1, axis=1))
    with pytest.raises(WrongAnswer, match=r"onnx\.int8 gives other logits than when it was made: to -?\d+\.\d dB \(at least \d\d\)"):
        open_bundle(copy).verify()


def test_verify_names_all_that_answer_wrongly() -> None:
    parities = {name: Parity(sqnr_db=sqnr, minimum_db=20, same_top1=1, passed=sqnr > 20) for name, sqnr in (("a", 3), ("b", 30), ("c", 4))}
    assert [line.split()[0] for line in str(wrong_answers(parities)).splitlines()] == ["a", "c"]
    assert wrong_answers({"b": parities["b"]}) is None


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


def test_the_golden_image_makes_its_input(bundle: Bundle) -> None:
    expected = np.load(bundle.root / "golden" / "image.npy")
    np.testing.assert_array_equal(read_image(bundle.root / "golden" / "image.png", bundle.info.preprocessing), expected)


def test_verify_finds_other_preprocessing(copy: Path) -> None:
    expected = np.load(copy / "golden" / "image.npy")
    std = np.array(open_bundle(copy).info.preprocessing.std, np.float32)[:, None, None]
    replace_golden(copy, expected + np.float32(1.2 / 255) / std, "image")  # as another rounding of the same
    open_bundle(copy).verify()
    replace_golden(copy, expected + np.float32(3 / 255) / std, "image")
    with pytest.raises(CheckFailed, match=r"golden/image\.png preprocessed here differs from golden/image\.npy by up to 3 of 255 levels"):
        open_bundle(copy).verify()


@pytest.mark.parametrize(("shape", "message"), [((1, 3, 64, 64), "differs from"), ((1, 3, 32, 32), "expected \\(1, 3, 64, 64\\)")])
def test_verify_finds_golden_pixels_that_are_none(shape: tuple[int, ...], message: str, copy: Path) -> None:
    replace_golden(copy, np.full(shape, np.nan, np.float32), "image")
    with pytest.raises(CheckFailed, match=message):
        open_bundle(copy).verify()


def test_bundles_from_before_golden_images_verify(copy: Path) -> None:
    for name in ("golden/image.png", "golden/image.npy"):
        (copy / name).unlink()
    edit_manifest(copy, lambda data: data.update(files=[f for f in data["files"] if not f["path"].startswith("golden/image")]))
    assert len(open_bundle(copy).verify()) == 1
