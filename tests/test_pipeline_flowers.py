"""The main job on photographs: minutes, so marked slow. A file of its own, to run beside the other."""

from pathlib import Path

import pytest
from pipeline_checks import check_bundle

from gcvit_edge import open_bundle, quantize
from gcvit_edge.backends import backend_names

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("artifacts_anew")]


def test_flowers_photographs(tmp_path: Path, shared: Path) -> None:
    bundle = quantize(
        "int8_ptq",
        weights=shared / "checkpoints" / "gcvit_xxtiny.flowers.safetensors",
        calib=shared / "data" / "flowers" / "train",
        eval=shared / "data" / "flowers" / "val",
        output=tmp_path / "bundle",
        zip=True,
    )
    check_bundle(bundle, 736)
    assert bundle.report["float"]["top1"] == pytest.approx(0.8655, abs=0.003)
    photo = next((shared / "data" / "flowers" / "val" / "sunflowers").iterdir())
    answers = {
        backend: open_bundle(tmp_path / "bundle.zip").predict([photo], backend=backend, top=1)[0][0][0] for backend in backend_names()
    }
    assert set(answers.values()) == {"sunflowers"}
