"""Networks without a checkpoint, whose logits show what every layer computes."""

import torch

from gcvit_edge.model.create import create_model
from gcvit_edge.model.gcvit import GCViT, LayerScale


def random_network(name: str, img_size: int | None = None) -> GCViT:
    """A variant with random weights, the same each time. Layer scales are 1: at 1e-5, as they start, blocks would add nothing to logits,
    and answers that are compared would say nothing of attention and MLPs."""
    torch.manual_seed(0)
    model = create_model(name, img_size=img_size)
    for module in model.modules():
        if isinstance(module, LayerScale):
            torch.nn.init.ones_(module.gamma)
    return model
