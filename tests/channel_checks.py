"""What must hold of everything that scales or moves channels: the network answers as before, in every form."""

import numpy as np
import torch
from torch import nn

from gcvit_edge.evaluate import sqnr_db
from gcvit_edge.model.deploy import rewrite
from gcvit_edge.model.form import Form

IMAGES = [image[None] for image in np.random.default_rng(0).standard_normal((12, 3, 64, 64), np.float32)]
FORMS = {
    "reference": Form(),
    "openvino": Form(gains=frozenset()),
    "executorch": Form(norm="products", attention="bmm", pointwise="conv"),
    "onnx": Form(attention="operator", gains=frozenset({"conv"})),
}


def logits(network: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([network(torch.from_numpy(image)).numpy() for image in IMAGES])


def check_logits_stay(changed: nn.Module, deployed: nn.Module, form: Form) -> None:
    assert sqnr_db(logits(rewrite(changed, form)), logits(deployed)) > 100
