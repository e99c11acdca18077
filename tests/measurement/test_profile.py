import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gcvit_edge.backends import backend_names, load_backend
from gcvit_edge.bundle import Bundle, open_bundle
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.lower import lower_float, lower_quantized
from gcvit_edge.measurement.operators import TimedOperator
from gcvit_edge.measurement.profile import profile_bundle, summarize, verdict
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.progress import Steps
from gcvit_edge.quantization.calibrate import calibrate
from gcvit_edge.recipe import parse_recipe, recipe_text
from gcvit_edge.report.profile import profile_table

IS_PRODUCT = re.compile(
    r".*(MatMul|Gemm|FullyConnected|Convolution|Attention|Batch Matrix)|\w*Conv(Integer)?$|Fully Connected.*(?<! averages)$"
)
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
    products = {"onnx": 47, "openvino": 45, "executorch": 66}  # ONNX keeps gates in float; OpenVINO merges linears with the same input
    for profile, integer in zip(profiles, (False, True), strict=True):
        assert profile["total_ms"] > 0
        assert sum(each["ms"] for each in profile["kinds"].values()) == pytest.approx(profile["total_ms"], abs=0.01)
        assert sum(each["count"] for each in profile["operators"]) == sum(each["count"] for each in profile["kinds"].values())
        assert {each["kind"] for each in profile["operators"] if each["integer"]} <= {"matrix"}
        elsewhere = [each["operator"] for each in profile["operators"] if each["kind"] != "matrix" and IS_PRODUCT.match(each["operator"])]
        assert elsewhere == []
        assert {each["kind"] for each in profile["operators"] if each["operator"] == "Pad"} <= {"layout"}
        assert profile["integer"]["of"] >= 62 if name == "openvino" else profile["integer"]["of"] == {"onnx": 82, "executorch": 88}[name]
        assert profile["integer"]["count"] == (products[name] if integer else 0)
        assert profile["delegated_share"] == (1 if name == "executorch" else None)
        assert profile["delegate_calls"] == (1 if name == "executorch" else None)
    assert "Invalid" not in json.dumps(profiles)  # what XNNPACK calls a table of GELU
    assert f"{products[name]} of" in verdict("int8", profiles[1], profiles[0])[0]


def test_attention_in_integers_is_attention_in_openvino(tmp_path: Path) -> None:
    """Fused, it goes by the name of its last operator, which is another than in float; other integer operators are no integer products."""
    torch.manual_seed(0)
    model = create_model(dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)
    recipe = parse_recipe(recipe_text("int8_ptq_full"), "int8_ptq_full")
    calibrated = calibrate(model, recipe, lambda: iter(IMAGES))
    artifact = lower_quantized("openvino", calibrated, describe_model(model), recipe, tmp_path)
    operators, _ = load_backend("openvino").profile(artifact.path, 1, IMAGES[0], 1)
    products = [each for each in operators if each.kind == "matrix" and ("bmm" in each.name or "Subgraph" in each.operator)]
    assert 6 <= len(products) <= 12  # of 6 blocks, fused or not
    assert {each.kind for each in operators if "bmm" in each.name and each.name.endswith("/MatMul")} <= {"matrix"}
    assert {each.kind for each in operators if each.integer} == {"matrix"}


@pytest.mark.parametrize(("name", "integer"), [("w4a8_ptq", True), ("int4_weights", False)])
def test_products_with_int4_weights(name: str, integer: bool, tmp_path: Path) -> None:
    """They are in integers where activations are rounded, which ONNX Runtime's profile does not say."""
    torch.manual_seed(0)
    model = create_model(dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)
    recipe = parse_recipe(recipe_text(name), name)
    artifact = lower_quantized("onnx", calibrate(model, recipe, lambda: iter(IMAGES)), describe_model(model), recipe, tmp_path)
    operators, _ = load_backend("onnx").profile(artifact.path, 1, IMAGES[0], 1)
    found = [(each.kind, each.integer) for each in operators if each.operator == "MatMulNBits"]
    assert found == [("matrix", integer)] * 24


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
            TimedOperator("a", "QGemm", "matrix", integer_ms, integer=True), TimedOperator("b", "Gemm", "matrix", float_ms),
            TimedOperator("c", "DequantizeLinear", "quantization", rounding_ms), TimedOperator("d", "Gelu", "other", other_ms),
        ],
        None,
    )  # fmt: skip


def test_verdict_says_what_bounds_a_faster_one() -> None:
    text = verdict("int8", summary(2, 0, 1, 5), summary(0, 8, 0, 5))[-1]
    assert text.startswith(
        "int8 is 1.62x as fast as float (8.0 against 13.0 ms): products -6.0, rounding and layout +1.0, other operators +0.0 ms. "
        "Were integer products free, it would be 2.17x. What bounds it is Gelu (5.0 ms)"
    )
    assert "1 of 2" in verdict("int8", summary(2, 0, 1, 5), summary(0, 8, 0, 5))[0]


def test_verdict_says_why_one_is_no_faster() -> None:
    text = verdict("w4a8", summary(2, 0, 7, 5), summary(0, 8, 0, 5))[-1]
    assert text == (
        "w4a8 is no faster, 0.93x as fast as float (14.0 against 13.0 ms): "
        "products -6.0, rounding and layout +7.0, other operators +0.0 ms. "
        "What takes longer is, most of all, rounding to integers and back: 7.0 ms more."
    )
    other = verdict("int8", summary(2, 0, 0, 13), summary(0, 8, 1, 5))[-1]
    assert "products -6.0, rounding and layout -1.0, other operators +8.0 ms" in other
    assert other.endswith("most of all, norms, softmax, GELU, additions and the like: 8.0 ms more.")


def test_verdict_between_no_faster_and_faster() -> None:
    assert "hardly faster, 1.04x as fast as float (12.5 against 13.0 ms)" in verdict("int8", summary(2, 0, 5.5, 5), summary(0, 8, 0, 5))[-1]
    assert verdict("int8", summary(8, 0, 0, 5), summary(0, 8, 0, 5))[-1].endswith("other operators +0.0 ms.")  # nothing takes longer


def test_verdict_takes_what_no_operator_took_for_none() -> None:
    def with_more(ms: float) -> dict:
        return summarize([TimedOperator("a", "QGemm", "matrix", 2, integer=True), TimedOperator("d", "Gelu", "other", 5),
                          TimedOperator("e", "Unattributed", "unattributed", ms)], None)  # fmt: skip

    first, last = verdict("int8", with_more(7), summary(0, 8, 0, 5))
    assert first.endswith("The rest of the 14.0 ms: 0.0 rounding and layout, 5.0 other operators, 7.0 of no operator.")
    assert "other operators +0.0, of no operator +7.0 ms. What takes longer is, most of all, what the profiler gives to no" in last
    assert "What bounds it is Gelu (5.0 ms)." in verdict("int8", with_more(3), summary(0, 8, 0, 5))[-1]


def test_verdict_without_integers() -> None:
    floats = summarize([TimedOperator("b", "Gemm", "matrix", 6), TimedOperator("d", "Gelu", "other", 5)], None)
    for reference in (summary(0, 8, 0, 5), summary(0, 6, 0, 5)):
        text = " ".join(verdict("fp16", floats, reference))
        assert "None of 1 linears, convolutions and attention products is integer arithmetic: 6.0 ms." in text
        assert "fp16 is" in text
        assert "free" not in text
        assert "INT8" not in text


def test_verdict_of_one_profile_alone() -> None:
    alone = summary(0, 8, 0, 5)
    assert "--with-float" in verdict("int8", alone, None)[-1]
    for name in ("float", "mine.etdump"):
        assert verdict(name, alone, None)[-1] == "There is no second profile to compare it with."


def test_summary_of_delegates() -> None:
    inside = TimedOperator("a", "Fully Connected", "matrix", 3)
    outside = TimedOperator("b", "native_layer_norm", "other", 1, delegated=False)
    assert summarize([inside, outside], 2)["delegated_share"] == 0.75
    assert "2 delegate calls, 75% of the time inside." in verdict("int8", summarize([inside, outside], 2), None)


def test_summary_of_nothing() -> None:
    assert summarize([], 1)["delegated_share"] is None
    assert verdict("int8", summarize([], 1), summary(0, 8, 0, 5)) == ["The profile has no operators."]


def test_profile_of_several_precisions_without_float(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = [dataclasses.replace(bundle.artifacts[0], precision=precision) for precision in ("int8", "w4a8")]
    monkeypatch.setattr(Bundle, "artifacts", artifacts)
    report = profile_bundle(bundle, "onnx", 1, None, Steps())
    assert list(report["profiles"]) == ["int8", "w4a8"]
    assert "--with-float" in report["verdict"][-1]


def test_profile_of_float_alone(bundle: Bundle) -> None:
    report = profile_bundle(bundle, "onnx", 1, None, Steps())
    assert list(report["profiles"]) == ["float"]
    assert report["verdict"][-1] == "There is no second profile to compare it with."
