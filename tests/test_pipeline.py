"""The main job on real models and images: minutes each, so marked slow; small models run it in test_bundle and test_cli."""

from pathlib import Path

import pytest

from gcvit_edge import open_bundle, quantize
from gcvit_edge.backends import backend_names
from gcvit_edge.bundle import Bundle

pytestmark = pytest.mark.slow


def check(bundle: Bundle, images: int) -> None:
    report = bundle.report
    assert report["images"] == images
    assert sorted(entry["backend"] for entry in report["artifacts"]) == backend_names()
    for entry in report["artifacts"]:
        assert entry["drop_points"] <= 0.5, entry
        assert entry["agreement"] >= 0.985, entry
        assert entry["sqnr_db"] >= 25, entry
        assert entry["size_bytes"] <= 0.30 * entry["float_size_bytes"], entry
        assert entry["within_limits"]
    assert bundle.manifest.within_limits
    assert all(replay.same_top1 for replay in bundle.verify())


def test_embedded_sample(tmp_path: Path) -> None:
    bundle = quantize("int8_ptq", output=tmp_path / "bundle")
    check(bundle, 2000)
    assert bundle.report["float"]["top1"] == pytest.approx(0.901, abs=0.001)
    assert bundle.info.origin.licence == "Apache-2.0"
    assert sum(bundle.report["seconds"].values()) < 30 * 60  # no timing test: only that nothing hangs


def test_flowers_photographs(tmp_path: Path, shared: Path) -> None:
    bundle = quantize(
        "int8_ptq",
        weights=shared / "checkpoints" / "gcvit_xxtiny.flowers.safetensors",
        calib=shared / "data" / "flowers" / "train",
        eval=shared / "data" / "flowers" / "val",
        output=tmp_path / "bundle",
        zip=True,
    )
    check(bundle, 736)
    assert bundle.report["float"]["top1"] == pytest.approx(0.8655, abs=0.003)
    photo = next((shared / "data" / "flowers" / "val" / "sunflowers").iterdir())
    answers = {
        backend: open_bundle(tmp_path / "bundle.zip").predict([photo], backend=backend, top=1)[0][0][0] for backend in backend_names()
    }
    assert set(answers.values()) == {"sunflowers"}
