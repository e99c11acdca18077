"""The main job on the embedded sample: minutes, so marked slow. A file of its own, to run beside the other."""

from pathlib import Path

import pytest
from pipeline_checks import check_bundle

from gcvit_edge import quantize

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("artifacts_anew")]


def test_embedded_sample(tmp_path: Path) -> None:
    bundle = quantize("int8_ptq", eval_images=1000, output=tmp_path / "bundle")
    check_bundle(bundle, 1000)
    assert bundle.report["float"]["top1"] == pytest.approx(0.902, abs=0.001)
    assert bundle.info.origin.licence == "Apache-2.0"
    assert sum(bundle.report["seconds"].values()) < 30 * 60  # no timing test: only that nothing hangs
