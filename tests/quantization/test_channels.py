"""What all that scales or moves channels promises: the network answers as before, however it is written."""

import copy

import numpy as np
import pytest
import torch
from channel_checks import IMAGES, logits
from torch import nn

from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.deploy import rewrite
from gcvit_edge.model.form import Form
from gcvit_edge.quantization.centering import centre
from gcvit_edge.quantization.channels import extremes, highest, scales
from gcvit_edge.quantization.equalization import equalize, equalize_streams
from gcvit_edge.quantization.smoothing import smooth

FORMS = {
    "reference": Form(),
    "openvino": Form(gains="none"),
    "executorch": Form(norm="products", attention="bmm", pointwise="conv", gains="mlp"),
    "executorch, all in integers": Form(norm="products", attention="bmm", pointwise="conv"),
    "onnx": Form(attention="operator", gains="none"),
}


@pytest.fixture(scope="module", params=[centre, smooth, equalize, equalize_streams])
def changed(request: pytest.FixtureRequest, deployed: nn.Module) -> nn.Module:
    network = copy.deepcopy(deployed)
    request.param(network, IMAGES)
    return network


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_logits_stay_in_every_form(deployed: nn.Module, changed: nn.Module, form: Form) -> None:
    assert sqnr_db(logits(rewrite(changed, form)), logits(deployed)) > 100


@torch.no_grad()
def test_extremes_are_those_of_the_first_32_images() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(2), nn.Linear(16, 2))
    images = [np.random.default_rng(seed).normal(1, 1 + 5 * (seed in (3, 32)), (1, 3, 4, 4)).astype(np.float32) for seed in range(40)]
    outputs = network[0](torch.from_numpy(np.concatenate(images[:32])))
    low, high = extremes(network, {"0": network[0]}, images)["0"]
    torch.testing.assert_close(low, outputs.amin((0, 2, 3)))
    torch.testing.assert_close(high, outputs.amax((0, 2, 3)))
    torch.testing.assert_close(highest((low, high)), outputs.abs().amax((0, 2, 3)))


def test_scales_make_channels_alike() -> None:
    magnitude, opposed = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([9.0, 1.0, 9.0])
    torch.testing.assert_close(scales(magnitude, opposed, 1.0), magnitude / 4)
    half = (magnitude / opposed).sqrt()
    torch.testing.assert_close(scales(magnitude, opposed, 0.5), half / half.log().mean().exp())
    assert (scales(magnitude, opposed, 0.0) == 1).all()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_channels_that_are_always_0_have_no_part_in_scales(strength: float) -> None:
    magnitude, opposed = torch.tensor([1.0, 0.0, 4.0, 3.0, 16.0]), torch.tensor([2.0, 1.0, 1.0, 0.0, 5.0])
    live = [0, 2, 4]
    found = scales(magnitude, opposed, strength)
    torch.testing.assert_close(found[live], scales(magnitude[live], opposed[live], strength))
    assert (found[[1, 3]] == 1).all()
    assert (scales(torch.zeros(3), torch.ones(3), strength) == 1).all()


def test_no_scale_is_more_than_e_to_the_6th() -> None:
    found = scales(torch.tensor([1e-5, 1.0, 1e5]), torch.ones(3), 1.0)
    torch.testing.assert_close(found, torch.tensor([-6.0, 0.0, 6.0]).exp())
