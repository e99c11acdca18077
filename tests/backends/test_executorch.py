import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from gcvit_edge.backends import executorch as backend
from gcvit_edge.errors import CheckFailed
from gcvit_edge.model.create import create_model, describe_model
from gcvit_edge.recipe import parse_recipe, recipe_text

RECIPE = parse_recipe(recipe_text("int8_ptq"), "int8_ptq")


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)


def lowered_plainly(graph: torch.export.ExportedProgram) -> tuple[Counter[str], bytes]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(copy.deepcopy(graph), partitioner=[XnnpackPartitioner()])
    calls = Counter(str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function")
    return calls, edge.to_executorch().buffer


def test_xnnpack_takes_the_float_deploy_form_of_xxt_as_one_delegate_call() -> None:
    model = create_model("gcvit_xxtiny")
    calls, _ = lowered_plainly(backend.capture(model, describe_model(model)))
    assert calls == {"executorch_call_delegate": 1, "<built-in function getitem>": 1}


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_fast_lowering_gives_the_same_file(precision: str, tmp_path: Path) -> None:
    model = small_model()
    info = describe_model(model)
    graph = backend.capture(model, info)
    if precision == "int8":
        images = [image[None] for image in np.random.default_rng(0).standard_normal((16, 3, 64, 64), np.float32)]
        graph = backend.quantize(graph, RECIPE, images)
    calls, plain = lowered_plainly(graph)
    assert calls == {"executorch_call_delegate": 1, "<built-in function getitem>": 1}
    backend.save(graph, tmp_path / "model.pte", info)
    assert (tmp_path / "model.pte").read_bytes() == plain


def test_a_graph_that_xnnpack_does_not_take_whole_is_refused(tmp_path: Path) -> None:
    class Sorts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sort(x).values + 1

    graph = torch.export.export(Sorts(), (torch.zeros(2, 3),))
    with pytest.raises(CheckFailed, match="did not take the whole network"):
        backend.save(graph, tmp_path / "model.pte", describe_model(small_model()))
    assert not (tmp_path / "model.pte").exists()
