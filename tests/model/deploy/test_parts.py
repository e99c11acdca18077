"""The parts of a deploy form, one after the other, are the deploy form."""

from collections.abc import Callable

import pytest
import torch

from gcvit_edge.model.deploy import deploy, rewrite
from gcvit_edge.model.deploy.parts import parts
from gcvit_edge.model.form import Form
from gcvit_edge.model.gcvit import GCViT

FORMS = [Form(), Form(norm="products", attention="bmm", pointwise="conv"), Form(attention="operator", gains="none")]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_parts_compose_to_the_network(make_model: Callable[..., GCViT], form: Form) -> None:
    network = rewrite(deploy(make_model()), form)
    image = torch.randn(2, 3, 64, 64)
    state: tuple[torch.Tensor, ...] = (image,)
    for part in parts(network):
        state = part.run(state)
    assert len(state) == 1
    assert torch.equal(state[0], network(image))


@torch.no_grad()
def test_every_layer_is_in_one_part_and_changes_nothing_before_it(make_model: Callable[..., GCViT]) -> None:
    network = deploy(make_model())
    steps = parts(network)
    image = torch.randn(1, 3, 64, 64)

    def states() -> list[torch.Tensor]:
        state: tuple[torch.Tensor, ...] = (image,)
        seen = []
        for step in steps:
            state = step.run(state)
            seen.append(state[0])
        return seen

    before = states()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            homes = [index for index, step in enumerate(steps) if step.layers and name.startswith(step.layers)]
            assert len(homes) == 1, name
            kept = module.weight.clone()
            module.weight.mul_(1.5)
            after = states()
            module.weight.copy_(kept)
            changed = [not torch.equal(a, b) for a, b in zip(after, before, strict=True)]
            assert not any(changed[: homes[0]]), name
            assert changed[-1], name
