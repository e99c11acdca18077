import copy
import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from gcvit_edge.backends import executorch as backend
from gcvit_edge.backends._xnnpack_layouts import folded_layouts
from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.model.deploy import deploy, rewrite
from gcvit_edge.quantization.arithmetic import Arithmetic
from gcvit_edge.quantization.ranges import observe
from gcvit_edge.quantization.scheme import quantize

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((16, 3, 64, 64), np.float32)]
OPERATORS = frozenset({"linear", "conv"})


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)


def captured(model: torch.nn.Module, arithmetic: Arithmetic | None) -> torch.export.ExportedProgram:
    deployed = rewrite(deploy(model), backend.form(OPERATORS if arithmetic else frozenset()))
    if arithmetic:
        deployed = quantize(deployed, OPERATORS, arithmetic, observe(deployed, lambda: iter(IMAGES)))
    return backend.capture(deployed, torch.zeros(1, 3, *model.config.img_size))


def lowered_plainly(graph: torch.export.ExportedProgram) -> tuple[Counter[str], bytes]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(copy.deepcopy(graph), partitioner=[XnnpackPartitioner()])
    calls = Counter(str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function")
    return calls, edge.to_executorch().buffer


def test_xnnpack_takes_the_float_deploy_form_of_xxt_as_one_delegate_call() -> None:
    calls, _ = lowered_plainly(captured(create_model("gcvit_xxtiny"), None))
    assert calls == {"executorch_call_delegate": 1, "<built-in function getitem>": 1}


@pytest.mark.parametrize("arithmetic", [None, pytest.param(backend.arithmetic(OPERATORS), marks=pytest.mark.slow)], ids=["float", "int8"])
def test_fast_lowering_gives_the_same_file(arithmetic: Arithmetic | None, tmp_path: Path) -> None:
    model = small_model()
    graph = captured(model, arithmetic)
    with folded_layouts():
        calls, plain = lowered_plainly(graph)
    assert calls == {"executorch_call_delegate": 1, "<built-in function getitem>": 1}
    backend.save(graph, tmp_path / "model.pte", describe_model(model))
    assert (tmp_path / "model.pte").read_bytes() == plain


@pytest.mark.parametrize("arithmetic", [None, pytest.param(backend.arithmetic(OPERATORS), marks=pytest.mark.slow)], ids=["float", "int8"])
def test_nothing_is_moved_between_tokens_and_feature_maps(arithmetic: Arithmetic | None, tmp_path: Path) -> None:
    graph = captured(small_model(), arithmetic)
    _, plain = lowered_plainly(graph)
    (tmp_path / "plain.pte").write_bytes(plain)
    with folded_layouts():
        _, folded = lowered_plainly(graph)
    (tmp_path / "folded.pte").write_bytes(folded)
    moved, logits = {}, {}
    for name in ("plain", "folded"):
        operators, _ = backend.profile(tmp_path / f"{name}.pte", 1, IMAGES[0], 1)
        moved[name] = sum(operator.operator.startswith("Transpose") for operator in operators)
        logits[name] = backend.load(tmp_path / f"{name}.pte", 1)(IMAGES[0])
    np.testing.assert_array_equal(logits["plain"], logits["folded"])
    # the image's; of q, k, v and the result of 6 blocks; of 2 stages' windows, and back; of the scores where one product serves all windows
    assert moved["folded"] == 1 + 4 * 6 + 2 * 2 + 2 < moved["plain"]


@pytest.mark.slow
def test_dynamic_linears_load_and_are_more_exact(tmp_path: Path) -> None:
    """They did not load in an earlier form (`XNNCompiler::compileModel failed`); with these versions no small graph fails so."""
    model = small_model()
    noise = {}
    for linear in ("static", "dynamic_row"):
        arithmetic = dataclasses.replace(backend.arithmetic(OPERATORS), linear=linear, mlp=linear, delicate=linear)
        backend.save(captured(model, arithmetic), tmp_path / f"{linear}.pte", describe_model(model))
        run = backend.load(tmp_path / f"{linear}.pte", 1)
        with torch.no_grad():
            noise[linear] = sqnr_db(np.concatenate([run(x) for x in IMAGES]), model(torch.from_numpy(np.concatenate(IMAGES))).numpy())
    assert noise["dynamic_row"] > noise["static"] > 25


def test_a_graph_that_xnnpack_does_not_take_whole_is_refused(tmp_path: Path) -> None:
    class Sorts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sort(x).values + 1

    graph = torch.export.export(Sorts(), (torch.zeros(2, 3),))
    with pytest.raises(CheckFailed, match="did not take the whole network"):
        backend.save(graph, tmp_path / "model.pte", describe_model(small_model()))
    assert not (tmp_path / "model.pte").exists()


def test_averages_are_told_from_linears(tmp_path: Path) -> None:
    model = small_model()
    backend.save(captured(model, None), tmp_path / "model.pte", describe_model(model))
    operators, _ = backend.profile(tmp_path / "model.pte", 1, IMAGES[0], 1)
    kinds = Counter(each.kind for each in operators if each.operator.startswith("Fully Connected"))
    norms, centred = 6 * 2 + 4 * 2 + 1, 4
    linears = 4 * 6 + 2 * 5 + 3 * 9 + 1  # of local blocks, of global ones, which have no q, of Fused-MBConvs, and the head
    assert kinds == {"matrix": linears, "other": norms + centred}


def test_products_of_attention_are_integer_if_asked_for(tmp_path: Path) -> None:
    """ExecuTorch's partitioner offers XNNPACK only float ones; that its kernel for INT8 takes ours shows in the runtime's own profile."""
    model = small_model()
    operators = frozenset({"linear", "conv", "attention"})
    deployed = rewrite(deploy(model), backend.form(operators))
    quantized = quantize(deployed, operators, backend.arithmetic(operators), observe(deployed, lambda: iter(IMAGES)))
    backend.save(backend.capture(quantized, torch.zeros(1, 3, *model.config.img_size)), tmp_path / "model.pte", describe_model(model))
    operators_run, calls = backend.profile(tmp_path / "model.pte", 1, IMAGES[0], 2)
    products = [each for each in operators_run if each.operator.startswith("Batch Matrix Multiply")]
    assert calls == 1
    assert len(products) == 2 * 6
    assert all("QS8" in each.operator and each.integer for each in products)


def test_what_is_no_etdump_is_refused(tmp_path: Path) -> None:
    from executorch.extension.pybindings import portable_lib

    model = create_model(dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)
    backend.save(captured(model, None), tmp_path / "model.pte", describe_model(model))
    module = portable_lib._load_for_executorch(str(tmp_path / "model.pte"), enable_etdump=True)
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
