"""The deploy form: the same function as `gcvit.GCViT`, written as runtimes want it, with converted weights.

Exact rewrites (same logits up to float rounding), each for a reason:

- Everything but the convolutions of more than one pixel works on tokens, a matrix (rows, C): such a matrix has one layout, so no
  runtime reorders it, and 1x1 convolutions are linears.
- GC ViT never shifts its windows, so a stage partitions once on entry and reverses once on exit, each as one rank-4
  transpose; a stage of one window does neither.
- Every tensor has rank <= 4: QNN, Vulkan, Core ML and LiteRT GPU refuse or slow down higher ranks.
- The layers that write what a LayerNorm reads are centred over channels, so every LayerNorm becomes an RMS norm: half the work.
- q, k and v are three linears; the attention scale is folded into q (local) or k (global); the affine of LayerNorm into
  the linears behind it; layer scale into proj and fc2; the relative position bias is a constant.
- The global query is never mixed up between images; where it is faster (`Form`), one product has the keys of all windows of its
  image, so that it is not repeated for every window.

The form is built once, in the way that `Form()` says, which is the one that quantization works on: weights are changed and ranges
observed there. `rewrite` then writes it as each backend wants it, with the same weights and the same names of layers.

The batch size is fixed when the form is exported; in PyTorch any batch runs.
"""

import copy

import torch
from torch import nn

from gcvit_edge.model import gcvit
from gcvit_edge.model.deploy.attention import Attention, Block
from gcvit_edge.model.deploy.convolutional import Downsample, MBConv
from gcvit_edge.model.deploy.network import Network
from gcvit_edge.model.deploy.primitives import Constant, Gain, Point, Residual, RMSNorm, Written
from gcvit_edge.model.form import Form

__all__ = ["Attention", "Block", "Constant", "Downsample", "Gain", "MBConv", "Point", "RMSNorm", "Residual", "deploy", "rewrite"]


def deploy(model: gcvit.GCViT) -> nn.Module:
    """The deploy form of a classifier: (B, in_chans, H, W) float32 -> (B, num_classes). `model` is not changed.

    Raises:
        ValueError: the model has no head (`num_classes` 0, or `features_only`).
    """
    if model.head is None:
        raise ValueError("the deploy form needs a classifier, but this model has no head; create it with num_classes > 0")
    with torch.no_grad():
        return Network(copy.deepcopy(model)).eval()  # parts of the copy live on in it


def rewrite(deployed: nn.Module, form: Form) -> nn.Module:
    """A copy of what `deploy` gave, written as `form` says; names of layers and shapes of weights stay, but 1x1 convolutions have
    two more axes where the form wants them as such."""
    written = copy.deepcopy(deployed)
    with torch.no_grad():
        for module in list(written.modules()):
            if isinstance(module, Written):
                module.write(form)
    return written
