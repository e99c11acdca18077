"""Weights of the deploy form: affines, layer scale and centring folded into linears and convolutions."""

from torch import Tensor, nn

from gcvit_edge.model import gcvit


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear with copies of these: weight (out, in), bias (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def fold_affine(norm: nn.LayerNorm, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """layer(x * gamma + beta) as one linear of x: its weight and bias."""
    return layer.weight * norm.weight, layer.bias + layer.weight @ norm.bias


def fold_residual(layer: nn.Linear, layer_scale: nn.Module) -> nn.Linear:
    """A linear that writes the residual stream: layer scale folded in, centred over its outputs."""
    weight, bias = layer.weight, layer.bias
    if isinstance(layer_scale, gcvit.LayerScale):
        weight, bias = weight * layer_scale.gamma[:, None], bias * layer_scale.gamma
    return linear(weight - weight.mean(0), bias - bias.mean())


def centred(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution whose output has mean 0 over channels; `conv` itself is changed."""
    conv.weight -= conv.weight.mean(0)
    if conv.bias is not None:
        conv.bias -= conv.bias.mean()
    return conv


def scale_rows(layer: nn.Linear | nn.Conv2d, factor: Tensor) -> None:
    """Multiplies the outputs of a layer by `factor` (out,), in place."""
    layer.weight *= factor.view(-1, *[1] * (layer.weight.ndim - 1))
    if layer.bias is not None:
        layer.bias.mul_(factor)
