"""What all that scales or moves channels promises: the network answers as before, however it is written."""

import copy

import pytest
from channel_checks import IMAGES, logits
from torch import nn

from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.model.deploy import rewrite
from gcvit_edge.model.form import Form
from gcvit_edge.quantization.centering import centre
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
