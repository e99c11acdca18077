import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gcvit_edge.backends import backend_names, load_backend
from gcvit_edge.bundle import Bundle, open_bundle
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.lower import lower_float, lower_quantized
from gcvit_edge.measurement.profile import Operator, profile_bundle, summarize, verdict
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.progress import Steps
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.recipe import parse_recipe, recipe_text
from gcvit_edge.report.profile import profile_table

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((4, 3, 64, 64), np.float32)]


@pytest.mark.parametrize("name", backend_names())
def test_profile_of_the_runtime_itself(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)
    info, backend = describe_model(model), load_backend(name)
    recipe = parse_recipe(recipe_text("int8_ptq"), "int8_ptq")
    calibrated = calibrate(model, recipe, lambda: iter(IMAGES))
    artifacts = [lower_float(name, model, info, tmp_path), lower_quantized(name, calibrated, info, recipe, tmp_path)]
    profiles = [summarize(*backend.profile(artifact.path, 1, IMAGES[0], 5)) for artifact in artifacts]
    linears = 44  # 62, of which OpenVINO merges those with the same input
    for profile, integer in zip(profiles, (False, True), strict=True):
        assert profile["total_ms"] > 0
        assert sum(each["ms"] for each in profile["kinds"].values()) == pytest.approx(profile["total_ms"], abs=0.01)
        assert sum(each["count"] for each in profile["operators"]) == sum(each["count"] for each in profile["kinds"].values())
        assert profile["kinds"]["matrix"]["count"] >= linears
        assert profile["integer"]["count"] >= linears if integer else profile["integer"]["count"] == 0
        assert profile["delegated_share"] == 1
        assert profile["delegate_calls"] == (1 if name == "executorch" else None)
    assert "Invalid" not in json.dumps(profiles)  # what XNNPACK calls a table of GELU
    assert "integer arithmetic" in verdict(profiles[1], profiles[0])[0]


def test_profile_of_a_bundle_without_golden_input(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.root, tmp_path / "copy"))
    shutil.rmtree(copy / "golden")
    with pytest.raises(CheckFailed, match=r"golden/input\.npy is missing from the bundle; get the bundle again"):
        profile_bundle(open_bundle(copy), "onnx", 1, None, Steps())


def test_profile_of_another_device(pte_bundle: Bundle, tmp_path: Path) -> None:
    from executorch.extension.pybindings import portable_lib

    module = portable_lib._load_for_executorch(str(pte_bundle.artifact("executorch").path), enable_etdump=True)
    module.forward([torch.from_numpy(pte_bundle.golden_input()[:1])])
    module.write_etdump_result_to_file(str(tmp_path / "dump"), str(tmp_path / "debug.bin"))
    with pytest.raises(UserError, match="--etdump reads what was measured before, so --threads 2 has no effect"):
        profile_bundle(pte_bundle, "executorch", 2, tmp_path / "dump", Steps())
    for name, claimed in {"model.float.etdump": "float", "model.int8.etdump": "int8", "mine.etdump": "mine.etdump"}.items():
        shutil.copy(tmp_path / "dump", tmp_path / name)
        report = profile_bundle(pte_bundle, "executorch", None, tmp_path / name, Steps())
        assert (report["threads"], list(report["profiles"])) == (None, [claimed])
        assert report["profiles"][claimed]["total_ms"] > 0
        assert str(profile_table(report).title).startswith("gcvit_custom, executorch:\n")


def summary(integer_ms: float, float_ms: float, rounding_ms: float, other_ms: float) -> dict:
    return summarize(
        [
            Operator("a", "QGemm", "matrix", integer_ms, integer=True), Operator("b", "Gemm", "matrix", float_ms),
            Operator("c", "DequantizeLinear", "quantization", rounding_ms), Operator("d", "Gelu", "other", other_ms),
        ],
        None,
    )  # fmt: skip


def test_verdict_says_what_bounds_a_faster_one() -> None:
    text = " ".join(verdict(summary(2, 0, 1, 5), summary(0, 8, 0, 5)))
    assert "1 of 2" in text
    assert "1.62x as fast as float (13.0 ms): products save 6.0 ms, rounding and layout add +1.0" in text
    assert "Were integer products free, it would be 2.17x: what bounds it is Gelu (5.0 ms)" in text


def test_verdict_says_why_int8_is_no_faster() -> None:
    text = " ".join(verdict(summary(2, 0, 7, 5), summary(0, 8, 0, 5)))
    assert "INT8 is no faster than float (14.0 against 13.0 ms): its products save 6.0 ms" in text
    assert "because rounding and layout cost 7.0 ms more" in text
    assert "keep-float" in " ".join(verdict(summary(2, 0, 7, 5), None))


def test_summary_of_delegates() -> None:
    inside, outside = Operator("a", "Fully Connected", "matrix", 3), Operator("b", "native_layer_norm", "other", 1, delegated=False)
    assert summarize([inside, outside], 2)["delegated_share"] == 0.75
    assert "2 delegate calls, 75% of the time inside." in verdict(summarize([inside, outside], 2), None)
