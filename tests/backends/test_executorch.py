import copy
import dataclasses
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from gcvit_edge.backends import executorch as backend
from gcvit_edge.backends._decompositions import without_retrace
from gcvit_edge.backends._fast_export import fast_export
from gcvit_edge.backends._xnnpack_layouts import folded_layouts
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.model.deploy import deploy, rewrite
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.integers import Affine
from gcvit_edge.quantization.keep import layer_names
from gcvit_edge.quantization.layers import DynamicConv2d, StaticLayer
from gcvit_edge.quantization.ranges import observe
from gcvit_edge.quantization.scheme import quantize

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((16, 3, 64, 64), np.float32)]
OPERATORS = frozenset({"linear", "conv"})


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)


def captured(model: torch.nn.Module, arithmetic: Arithmetic | None) -> torch.export.ExportedProgram:
    deployed = rewrite(deploy(model), backend.form(OPERATORS if arithmetic else frozenset()))
    if arithmetic:
        deployed = quantize(deployed, OPERATORS, arithmetic, observe(deployed, lambda: iter(IMAGES)))
    return backend.capture(deployed, torch.zeros(1, 3, *model.config.img_size))


def lowered_plainly(graph: torch.export.ExportedProgram) -> bytes:
    """As ExecuTorch's documentation says; the whole is one delegate call nevertheless."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(copy.deepcopy(graph), partitioner=[XnnpackPartitioner()])
    calls = Counter(str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function")
    assert calls == {"executorch_call_delegate": 1, "<built-in function getitem>": 1}
    return edge.to_executorch().buffer


@pytest.mark.slow
def test_xnnpack_takes_the_float_deploy_form_of_xxt_as_one_delegate_call(tmp_path: Path) -> None:
    model = create_model("gcvit_xxtiny")
    with fast_export():
        (file,) = backend.save(captured(model, None), tmp_path / "model.pte", describe_model(model))
    _, calls = backend.profile(file, 1, np.zeros((1, 3, 224, 224), np.float32), 1)
    assert calls == 1


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A graph, and the file that the backend makes of it."""

    graph: torch.export.ExportedProgram
    file: Path


def lowered(arithmetic: Arithmetic | None, folder: Path) -> Lowered:
    model = small_model()
    graph = captured(model, arithmetic)
    with fast_export():
        (file,) = backend.save(graph, folder / "model.pte", describe_model(model))
    return Lowered(graph, file)


@pytest.fixture(scope="module")
def small_float(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lowered(None, tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def small_int8(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lowered(backend.arithmetic(OPERATORS, "vnni"), tmp_path_factory.mktemp("int8"))


@pytest.fixture(params=["small_float", pytest.param("small_int8", marks=pytest.mark.slow)])
def small(request: pytest.FixtureRequest) -> Lowered:
    return request.getfixturevalue(request.param)


@pytest.mark.slow
def test_fast_lowering_gives_the_same_file(small: Lowered) -> None:
    with without_retrace(), folded_layouts():
        assert small.file.read_bytes() == lowered_plainly(small.graph)


def test_nothing_is_moved_between_tokens_and_feature_maps(small: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gcvit_edge.backends._xnnpack_layouts.folded_layouts", nullcontext)
    with fast_export():
        (unfolded,) = backend.save(small.graph, tmp_path / "unfolded.pte", describe_model(small_model()))
    moved, logits = [], []
    for file in (small.file, unfolded):
        operators, _ = backend.profile(file, 1, IMAGES[0], 1)
        moved.append(sum(operator.operator.startswith("Transpose") for operator in operators))
        logits.append(backend.load(file, 1)(IMAGES[0]))
    np.testing.assert_array_equal(*logits)
    # the image's; of q, k, v and the result of 5 blocks; of 2 stages' windows, and back; of the scores where one product serves all windows
    assert moved[0] == 1 + 4 * 5 + 2 * 2 + 1 < moved[1]


@pytest.mark.slow
def test_dynamic_linears_load_and_are_more_exact(small_float: Lowered, tmp_path: Path) -> None:
    """They did not load in an earlier form (`XNNCompiler::compileModel failed`); with these versions no small graph fails so."""
    expected = answers(small_float)
    noise = {}
    for linear in ("static", "dynamic_row"):
        arithmetic = dataclasses.replace(backend.arithmetic(OPERATORS, "vnni"), linear=linear, mlp=linear, delicate=linear)
        noise[linear] = sqnr_db(answers(lowered(arithmetic, tmp_path)), expected)
    assert noise["dynamic_row"] > noise["static"] > 25


def answers(artifact: Lowered) -> np.ndarray:
    run = backend.load(artifact.file, 1)
    return np.concatenate([run(image) for image in IMAGES])


@pytest.mark.parametrize("bias", [3.0, -3.0])
@pytest.mark.parametrize("weight", [0.0, 1e-6, 0.05])
def test_biases_of_rows_without_weights(weight: float, bias: float, tmp_path: Path) -> None:
    """As pruned networks have them; in steps of the input's and the row's scale they would not fit XNNPACK's 32 bits."""
    torch.manual_seed(0)
    x, linear = torch.randn(1, 16, 32), torch.nn.Linear(32, 16).eval()
    with torch.no_grad():
        linear.weight[:4] *= weight / linear.weight[:4].abs().max()
        linear.bias[:4] = bias
    layer = StaticLayer(linear, Affine.of_range(-4, 4, "int8"), Affine.of_range(-4, 4, "int8")).eval()
    with torch.no_grad():
        simulated, exact = layer(x).numpy(), linear(x).numpy()
    (file,) = backend.save(backend.capture(layer, x), tmp_path / "model.pte", describe_model(small_model()))
    answer = backend.load(file, 1)(x.numpy())
    assert np.abs(answer - simulated).max() <= layer.output.scale * 1.01  # a step, where sums round otherwise
    assert sqnr_db(answer, exact) > 35


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_round_as_is_simulated(kernel: int, tmp_path: Path) -> None:
    """Of 3x3 convolutions XNNPACK rounds an image with one scale, of 1x1 ones each pixel with its own."""
    torch.manual_seed(0)
    image = torch.randn(1, 32, 9, 9) * torch.linspace(0.1, 4, 81).reshape(9, 9)
    layer = DynamicConv2d(torch.nn.Conv2d(32, 16, kernel, padding=kernel // 2)).eval()
    with torch.no_grad():
        simulated = layer(image).numpy()
        exact = layer.product(image, layer.weight()).numpy()
    (file,) = backend.save(backend.capture(layer, image), tmp_path / "model.pte", describe_model(small_model()))
    answer = backend.load(file, 1)(image.numpy())
    assert sqnr_db(answer, simulated) > 100 > 60 > sqnr_db(simulated, exact)


def test_a_graph_that_xnnpack_does_not_take_whole_is_refused(tmp_path: Path) -> None:
    class Sorts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sort(x).values + 1

    graph = torch.export.export(Sorts(), (torch.zeros(2, 3),))
    with pytest.raises(CheckFailed, match="did not take the whole network"):
        backend.save(graph, tmp_path / "model.pte", describe_model(small_model()))
    assert not (tmp_path / "model.pte").exists()


def test_averages_are_told_from_linears(small_float: Lowered) -> None:
    operators, calls = backend.profile(small_float.file, 1, IMAGES[0], 1)
    assert calls == 1
    kinds = Counter(each.kind for each in operators if each.operator.startswith("Fully Connected"))
    norms, centred = 5 * 2 + 4 * 2 + 1, 4
    linears = 4 * 6 + 1 * 5 + 3 * 7 + 1  # of local blocks, of the global one, which has no q, of Fused-MBConvs, and the head
    assert kinds == {"matrix": linears, "other": norms + centred}


def test_a_profile_adds_up_to_the_inference(tmp_path: Path) -> None:
    """Also where not all is delegated: what runs an operator outside is timed around it once more."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.devtools import Inspector
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings import portable_lib

    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)).eval()
    image = torch.zeros(16, 64)
    program = to_edge_transform_and_lower(torch.export.export(layers, (image,)), partitioner=[XnnpackPartitioner()]).to_executorch()
    (tmp_path / "model.pte").write_bytes(program.buffer)
    module = portable_lib._load_for_executorch(str(tmp_path / "model.pte"), enable_etdump=True)
    for _ in range(5):
        module.forward([image])
    module.write_etdump_result_to_file(str(tmp_path / "dump"), str(tmp_path / "debug.bin"))
    events = [event for block in Inspector(etdump_path=str(tmp_path / "dump")).event_blocks for event in block.events]
    (whole,) = (np.median(event.perf_data.raw) for event in events if event.name == "Method::execute")
    operators, calls = backend.read_etdump(tmp_path / "dump")
    assert calls == 2
    assert [each.operator for each in operators if not each.delegated] == ["native_call_native_layer_norm.out", "Unattributed"]
    assert sum(each.ms for each in operators) == pytest.approx(whole)


def test_products_of_attention_are_integer_if_asked_for(tmp_path: Path) -> None:
    """ExecuTorch's partitioner offers XNNPACK only float ones; that its kernel for INT8 takes ours shows in the runtime's own profile."""
    model = small_model()
    operators = frozenset({"linear", "conv", "attention"})
    deployed = rewrite(deploy(model), backend.form(operators))
    quantized = quantize(deployed, operators, backend.arithmetic(operators, "vnni"), observe(deployed, lambda: iter(IMAGES)))
    with fast_export():
        backend.save(backend.capture(quantized, torch.zeros(1, 3, *model.config.img_size)), tmp_path / "model.pte", describe_model(model))
    operators_run, calls = backend.profile(tmp_path / "model.pte", 1, IMAGES[0], 2)
    products = [each for each in operators_run if each.operator.startswith("Batch Matrix Multiply")]
    assert calls == 1
    assert len(products) == 2 * 5
    assert all("QS8" in each.operator and each.integer for each in products)


@pytest.mark.slow
def test_anything_that_can_stay_float_may(tmp_path: Path) -> None:
    """Of an addition all of it: with its stream alone in float, the partitioner finds cycles."""
    model = small_model()
    operators = frozenset({"linear", "conv", "attention", "residual"})
    deployed = rewrite(deploy(model), backend.form(operators))
    ranges = observe(deployed, lambda: iter(IMAGES))
    block = "stages.0.blocks.1"
    kept = {f"{block}.{name}" for name in ("residual1", "attention.scores", "attention.k", "fc2")}
    kept |= {f"stages.1.blocks.0.{name}" for name in ("residual2", "attention.softmax", "attention.value")}
    assert kept <= set(layer_names(deployed))
    quantized = quantize(deployed, operators, backend.arithmetic(operators, "vnni"), ranges, keep=kept)
    (file,) = backend.save(backend.capture(quantized, torch.zeros(1, 3, *model.config.img_size)), tmp_path / "x.pte", describe_model(model))
    with torch.no_grad():
        simulated = quantized(torch.from_numpy(IMAGES[0])).numpy()
    assert sqnr_db(backend.load(file, 1)(IMAGES[0]), simulated) > 20


def test_what_is_no_etdump_is_refused(small_float: Lowered, tmp_path: Path) -> None:
    from executorch.extension.pybindings import portable_lib

    module = portable_lib._load_for_executorch(str(small_float.file), enable_etdump=True)
    module.forward([torch.from_numpy(IMAGES[0])])
    file = tmp_path / "profile.etdump"
    module.write_etdump_result_to_file(str(file), str(tmp_path / "debug.bin"))
    whole = file.read_bytes()
    for content in (b"", b"Apache License\n" * 100, whole[:16], whole[: len(whole) // 2], whole[:-100]):
        file.write_bytes(content)
        with pytest.raises(
            UserError, match=r"profile\.etdump is no ETDump, or not a whole one; expected a file that `gcvit-edge benchmark"
        ):
            backend.read_etdump(file)


def test_one_thread_exports_at_a_time() -> None:
    """Two that came and went in turn would leave what the first put aside for good."""
    lint, order = torch.fx.Graph.lint, []

    def export(name: str) -> None:
        with fast_export():
            order.append(name)
            entered.set()
            time.sleep(0.2)
            order.append(name)

    entered = threading.Event()
    threads = [threading.Thread(target=export, args=(name,)) for name in "ab"]
    threads[0].start()
    entered.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert order == ["a", "a", "b", "b"]
    assert torch.fx.Graph.lint is lint
