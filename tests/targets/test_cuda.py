"""The GPU target on a machine without one: the refusal, and the same code on the CPU, all but CUDA graphs."""

import gc
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from images import noise, save_all
from target_contract import BRIEF

from gcvit_edge import export_float, load_model, open_bundle
from gcvit_edge.bundle import Bundle
from gcvit_edge.cli import main
from gcvit_edge.cli._options import report_error
from gcvit_edge.errors import CheckFailed, UserError, WrongAnswer
from gcvit_edge.measurement.devices import Device
from gcvit_edge.measurement.measure import benchmark_bundle, evaluate_bundle
from gcvit_edge.measurement.result import Report
from gcvit_edge.measurement.timing import time_sessions
from gcvit_edge.model.checkpoint import save_checkpoint
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.progress import Steps
from gcvit_edge.targets import Case, _pytorch_ways, cuda
from gcvit_edge.targets._cuda_worker import load_onnx, load_pytorch
from gcvit_edge.targets._pytorch_ways import Float8Linear, float8_linears, float8_rows, int8_linears

without_gpu = pytest.mark.skipif(cuda.missing("") is None, reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways are those of a GPU without it, wherever this runs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def cases(bundle: Bundle, weights: Path, arithmetic: str) -> list[Case]:
    return cuda._pytorch_cases(bundle.artifacts, cuda.Options(weights, arithmetic))


@pytest.fixture(scope="module")
def two_backends(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_float(weights=str(weights), backends=["onnx", "openvino"], output=tmp_path_factory.mktemp("two") / "bundle", threads=1)


@without_gpu
def test_refused_without_a_gpu(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", str(bundle.root), "--target", "cuda"]) == 2
    assert "target 'cuda' cannot be used here: " in " ".join(capfd.readouterr().err.split())


@without_gpu
@pytest.mark.parametrize(("address", "message"), [("", "there is no GPU 0: PyTorch finds 0"), ("cpu", "give the number of a GPU")])
def test_a_gpu_that_is_not_there(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message), cuda.connect(address, cuda.Options()):
        pass


def test_ways_of_pytorch(bundle: Bundle, weights: Path) -> None:
    found = cases(bundle, weights, "bfloat16")
    assert [case.name for case in found] == [
        "pytorch.float (eager, bfloat16)",
        "pytorch.float (compiled, bfloat16)",
        "pytorch.float (CUDA graphs, bfloat16)",
        "pytorch.float (compiled, CUDA graphs, bfloat16)",
        "pytorch.int8 (torchao, compiled, CUDA graphs, bfloat16)",
    ]
    assert {case.golden for case in found} == {bundle.artifact("onnx")}
    assert bundle.parity(cases(bundle, weights, "float32")[0], bundle.golden_logits(bundle.artifact())).minimum_db == 80
    assert bundle.parity(found[0], bundle.golden_logits(bundle.artifact())).minimum_db == 25
    assert bundle.parity(found[-1], bundle.golden_logits(bundle.artifact())).minimum_db == 20


def test_torchao_is_a_way_where_it_is_installed(bundle: Bundle, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [case.artifact.precision for case in cases(bundle, weights, "float32")] == ["float"] * 4 + ["int8"]
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert [case.artifact.precision for case in cases(bundle, weights, "float32")] == ["float"] * 4
    with pytest.raises(
        UserError, match="way int8 needs the package torchao, which is not installed; install it, or leave int8 out of --ways"
    ):
        cuda._pytorch_cases(bundle.artifacts, cuda.Options(weights, ways="eager,int8"))


def test_ways_that_are_chosen(bundle: Bundle, weights: Path) -> None:
    found = cuda._pytorch_cases(bundle.artifacts, cuda.Options(weights, ways="compiled-graphs, eager"))
    assert [case.execution for case in found] == ["compiled, CUDA graphs, float32", "eager, float32"]
    with pytest.raises(UserError, match="unknown way to run PyTorch 'graph'; did you mean 'graphs'"):
        cuda._pytorch_cases(bundle.artifacts, cuda.Options(weights, ways="eager,graph"))


def test_fp8_is_a_way_where_the_gpu_has_it(bundle: Bundle, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(8, 6), (8, 9)].__getitem__)
    case = cases(bundle, weights, "bfloat16")[-1]
    assert case.name == "pytorch.fp8 (FP8, compiled, CUDA graphs, bfloat16)"
    assert bundle.parity(case, bundle.golden_logits(bundle.artifact())).minimum_db == 20
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(8, 6), (8, 0)].__getitem__)
    assert "FP8" not in cases(bundle, weights, "bfloat16")[-1].name
    with pytest.raises(UserError, match=r"way fp8 needs a GPU of compute capability 8\.9 or later \(Ada, Hopper\); .* leave fp8 out"):
        cuda._pytorch_cases(bundle.artifacts, cuda.Options(weights, ways="fp8"))


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU, which has no CUDA graphs, instead of a GPU."""

    @contextmanager
    def connect(address: str, options: cuda.Options) -> Iterator[cuda.Gpu]:
        yield cuda.Gpu("cpu")

    monkeypatch.setattr(cuda, "connect", connect)


def test_weights_of_another_network_are_named_as_a_cause(bundle: Bundle, tmp_path: Path, on_the_cpu: None) -> None:
    def run(classes: int) -> Report:
        model = create_model(dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=classes, img_size=64)
        save_checkpoint(model, describe_model(model), tmp_path / "other.safetensors", half=False)
        device = Device("cuda", "cuda", "", cuda.Options(tmp_path / "other.safetensors", ways="eager"), 1)
        return benchmark_bundle(bundle, [device], BRIEF, Steps())

    error = report_error(run(8))
    assert isinstance(error, WrongAnswer)
    assert str(error).endswith("or PyTorch's --weights are not those that the bundle was made of")
    with pytest.raises(
        CheckFailed, match=r"gives \(2, 5\) logits, .* for PyTorch, give --weights the checkpoint that the bundle was made of"
    ):
        run(5)


def test_a_way_that_does_not_run_leaves_the_others_their_results(bundle: Bundle, weights: Path, on_the_cpu: None) -> None:
    device = Device("cuda", "cuda", "", cuda.Options(weights, ways="graphs,eager"), 1)
    (run,) = benchmark_bundle(bundle, [device], BRIEF, Steps()).runs
    assert [result.execution for result in run.results] == ["eager, float32"]
    assert (run.error or "").startswith("pytorch.float (CUDA graphs, float32): one_block.safetensors does not run in pytorch")
    assert (run.error or "").endswith("\nto do without it, give --ways without graphs")


def test_an_int8_golden_lowers_the_floor(bundle: Bundle, weights: Path, tmp_path: Path) -> None:
    copy = open_bundle(shutil.copytree(bundle.root, tmp_path / "copy"))
    artifact = replace(copy.artifact(), precision="int8")
    logits = copy.golden_logits(copy.artifact())
    np.save(copy.root / "golden" / "onnx.int8.npy", logits)
    result = {"backend": "onnx", "precision": "int8", "sqnr_db": 42.0}
    measured = Bundle(copy.path, copy.root, copy.manifest.model_copy(update={"results": [result]}))
    cases = cuda._pytorch_cases([artifact], cuda.Options(weights))
    assert {case.golden for case in cases} == {artifact}
    # INT8 is as far from float as it was measured to be; torchao's is another one than the artifact's: it has the noise of both
    floors = {case.execution: measured.parity(case, logits).minimum_db for case in cases}
    assert floors.pop("torchao, compiled, CUDA graphs, float32") == 20
    assert set(floors.values()) == {30}
    assert measured.parity(Case(artifact, "cpu"), logits).minimum_db == 36


class StubbedGraph:
    """Of a machine without a GPU: what is captured cannot be replayed, but what it keeps can be seen."""

    def replay(self) -> None:
        pass


def test_a_captured_graph_keeps_its_weights(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.nn.Module]] = []
    prepare = _pytorch_ways.prepare

    def watched(model: torch.nn.Module, *rest: Any) -> Any:
        seen.append(weakref.ref(model))
        return prepare(model, *rest)

    nothing = SimpleNamespace(wait_stream=lambda _: None)
    for name, value in {"Stream": lambda _: nothing, "current_stream": lambda _: nothing, "CUDAGraph": StubbedGraph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(_pytorch_ways, "prepare", watched)
    run = load_pytorch(str(weights), "cpu", ["CUDA graphs", "float32"])
    gc.collect()
    assert seen[0]() is not None  # else the caching allocator gives their memory to the next tensor
    assert run(np.zeros((1, 3, 64, 64), np.float32)).shape == (1, 8)


def test_fp8_is_compared_with_float(
    bundle: Bundle, weights: Path, on_the_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cuda.WAYS, "fp8", "FP8, eager")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    save_all(tmp_path, {f"{label}/{i}.png": noise(64, 64, seed=8 * i + int(label)) for i in range(3) for label in "01234567"})
    device = Device("cuda", "cuda", "", cuda.Options(weights, ways="fp8,eager"), 1)
    monkeypatch.setattr("gcvit_edge.measurement.measure.check_baseline", lambda *_: None)  # the weights are random
    (run,) = evaluate_bundle(bundle, [device], tmp_path, Steps()).runs
    results = {result.precision: result.accuracy for result in run.results}
    assert results["float"].sqnr_db is None
    assert 20 < results["fp8"].sqnr_db < 60


def test_options_that_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    assert cuda._pytorch_cases(bundle.artifacts, cuda.Options()) == []
    with pytest.raises(UserError, match="unknown arithmetic 'bfloat'; did you mean 'bfloat16'"):
        cases(bundle, tmp_path, "bfloat")
    with pytest.raises(UserError, match=r"none\.pth does not exist; give --weights the file that the bundle was made of"):
        cases(bundle, tmp_path / "none.pth", "tf32")


def test_artifacts_run_where_their_runtime_has_a_gpu_build(two_backends: Bundle) -> None:
    found = cuda._artifact_cases(two_backends.artifacts, {"onnx": "CUDA provider"})
    assert [case.name for case in found] == ["onnx.float (CUDA provider)"]


def test_code_in_the_current_folder_is_not_run(two_backends: Bundle, shadowed: None) -> None:
    with cuda.Gpu("cpu").open(Case(two_backends.artifact("openvino"), "plugin"), 1, pinned=False) as session:
        assert session.runtime == "openvino"


@pytest.mark.parametrize("arithmetic", ["float32", "tf32", "float16", "bfloat16"])
def test_pytorch_reproduces_the_golden_logits(arithmetic: str, bundle: Bundle, weights: Path) -> None:
    case = cases(bundle, weights, arithmetic)[0]
    with cuda.Gpu("cpu").open(case, 1, pinned=True) as session:
        assert (session.runtime, session.runtime_version) == ("torch", torch.__version__.partition("+")[0])
        parity = bundle.parity(case, session.infer(bundle.golden_input(), lambda: None))
        assert parity.passed, parity
        (timing,) = time_sessions([session], bundle.golden_input()[:1], 1, BRIEF, lambda: None)
        assert len(timing.samples) == 6


def test_torchao(bundle: Bundle, weights: Path) -> None:
    case = replace(cases(bundle, weights, "float32")[-1], execution="torchao, eager")
    with cuda.Gpu("cpu").open(case, 1, pinned=False) as session:
        parity = bundle.parity(case, session.infer(bundle.golden_input(), lambda: None))
    assert parity.passed
    assert parity.sqnr_db < 80  # it is in INT8: float would be equal to far more


def test_linears_that_cublas_cannot_run_stay_in_float(weights: Path) -> None:
    model = load_model(str(weights))[0]
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    before = {name: type(model.get_submodule(name).weight) for name in names}
    with torch.no_grad():
        count = int8_linears(model, torch.zeros(1, 3, 64, 64))
    changed = [name for name in names if type(model.get_submodule(name).weight) is not before[name]]
    assert 0 < len(changed) == count < len(names)
    assert "head.fc" not in changed
    assert any(name.endswith("qkv") for name in changed)


def test_fp8(bundle: Bundle, weights: Path) -> None:
    case = replace(cases(bundle, weights, "bfloat16")[0], execution="FP8, eager, bfloat16", arithmetic="fp8")
    with cuda.Gpu("cpu").open(case, 1, pinned=False) as session:
        parity = bundle.parity(case, session.infer(bundle.golden_input(), lambda: None))
    assert parity.passed
    assert parity.sqnr_db < 40  # three bits of mantissa


def test_rows_in_fp8() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [3e4, 1.0, -3e4]])
    rows, scale = float8_rows(x)
    assert rows.dtype == torch.float8_e4m3fn
    assert scale.shape == (3, 1)
    assert rows.float().abs().amax(1).tolist() == [448, 0, 448]
    torch.testing.assert_close(rows.float() * scale, x, rtol=2**-4, atol=2**-10 * 3e4 / 448)


def test_a_linear_in_fp8_is_the_product_of_what_is_rounded() -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(32, 48), torch.randn(2, 5, 32)
    (rows, scale), (weight, by_row) = float8_rows(x.reshape(-1, 32)), float8_rows(linear.weight.detach())
    wanted = (rows.float() * scale) @ (weight.float() * by_row).t() + linear.bias
    with torch.no_grad():
        out = Float8Linear(linear)(x)
    assert out.shape == (2, 5, 48)
    torch.testing.assert_close(out.reshape(-1, 48), wanted, rtol=2**-7, atol=2**-7)  # bfloat16 inside


def test_linears_that_cublas_cannot_multiply_in_fp8_stay(weights: Path) -> None:
    model = load_model(str(weights))[0]
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    count = float8_linears(model)
    changed = [name for name in names if isinstance(model.get_submodule(name), Float8Linear)]
    assert 0 < len(changed) == count < len(names)
    assert "head.fc" not in changed  # 8 classes
    assert any(name.endswith("qkv") for name in changed)


@pytest.mark.slow
def test_what_cannot_be_compiled_is_not_loaded(bundle: Bundle, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(CheckFailed, match=r"(?s)does not run in pytorch.*to do without it, give --ways without compiled$"):
        cuda.Gpu("cpu").open(cases(bundle, weights, "float32")[1], 1, pinned=False)


@pytest.mark.slow
def test_compiled(bundle: Bundle, weights: Path) -> None:
    case = cases(bundle, weights, "float32")[1]
    with cuda.Gpu("cpu").open(case, 1, pinned=False) as session:
        assert bundle.parity(case, session.infer(bundle.golden_input(), lambda: None)).passed


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_artifacts(backend: str, two_backends: Bundle) -> None:
    case = Case(two_backends.artifact(backend), "on the device")
    with cuda.Gpu("cpu").open(case, 1, pinned=False) as session:
        assert session.runtime == {"onnx": "onnxruntime"}.get(backend, backend)
        assert two_backends.parity(case, session.infer(two_backends.golden_input(), lambda: None)).passed


def test_cuda_of_pip_is_loaded_before_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def session(*_: Any, **__: Any) -> Any:
        done.append("session")
        return SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"], get_inputs=lambda: [SimpleNamespace(name="image")])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: done.append("libraries"))
    load_onnx("model.onnx", "cuda:0", 1)
    assert done == ["libraries", "session"]
    monkeypatch.delattr(onnxruntime, "preload_dlls")  # before 1.21
    load_onnx("model.onnx", "cuda:0", 1)


def test_a_wrong_checkpoint_is_told(bundle: Bundle, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.safetensors"):
        cases(bundle, broken, "float32")
