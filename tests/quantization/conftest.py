"""A network with outlier channels, for what works on channels."""

import pytest
import torch
from torch import nn

from gcvit_edge.model.create import create_model
from gcvit_edge.model.deploy import deploy


@pytest.fixture(scope="session")
def deployed() -> nn.Module:
    """With outlier channels, as trained networks have them, behind norms, gates and reductions, and with biases."""
    torch.manual_seed(0)
    model = create_model(dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8), num_classes=8, img_size=64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter[::7] *= 12
            elif name.endswith(("qkv.weight", "fc1.weight")):
                parameter[:, ::7] /= 12
            elif name.endswith(("conv_pw.weight", "fc2.weight", "reduction.weight")) and parameter.ndim >= 2:
                parameter[::5] *= 3
            elif name.endswith(".bias"):  # which are 0 after initialisation
                parameter += torch.randn_like(parameter) * 0.1
    return deploy(model)
