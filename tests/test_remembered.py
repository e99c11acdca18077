"""What the suite itself relies on: networks that differ in anything are not taken for one."""

from collections.abc import Callable

import torch
from remembered import digest
from torch import nn

from gcvit_edge.model.create import describe_model
from gcvit_edge.model.deploy import RMSNorm, deploy, rewrite
from gcvit_edge.model.form import Form
from gcvit_edge.model.gcvit import GCViT


def test_the_same_network_is_known_again(make_model: Callable[..., GCViT]) -> None:
    first, second = (make_model(depths=(1, 1, 1, 1)) for _ in range(2))
    assert digest(deploy(first), describe_model(first)) == digest(deploy(second), describe_model(second))


def test_anything_else_is_another(make_model: Callable[..., GCViT]) -> None:
    def network() -> nn.Module:
        return deploy(make_model(depths=(1, 1, 1, 1)))

    def changed(change: Callable[[nn.Module], object]) -> nn.Module:
        each = network()
        with torch.no_grad():
            change(each)
        return each

    def last_bit(each: nn.Module) -> None:
        weight = next(each.parameters()).view(-1)[:1]
        weight.copy_(torch.nextafter(weight, weight + 1))

    def norm(each: nn.Module) -> RMSNorm:
        return next(module for module in each.modules() if isinstance(module, RMSNorm))

    model = make_model(depths=(1, 1, 1, 1))
    info = describe_model(model)
    found = [
        digest(network(), info),
        digest(network(), info.model_copy(update={"name": "other"})),
        *(digest(each, info) for each in (
            changed(last_bit),
            changed(lambda each: setattr(norm(each), "eps", 1e-3)),
            changed(lambda each: each.half()),
            changed(lambda each: each.train()),
            rewrite(network(), Form(norm="products")),
            rewrite(network(), Form(attention="bmm")),
        )),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
