"""What the parts of the deploy form are made of: places to round at, factors by channel, norms of centred tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcvit_edge.model.deploy.folding import scale_rows
from gcvit_edge.model.form import Form
from gcvit_edge.model.gcvit import NORM_EPS


class Written(nn.Module):
    """A part that can be written in more than one way."""

    form = Form()

    def write(self, form: Form) -> None:
        self.form = form


class Constant(nn.Module):
    """A constant of the network; quantization may store it in fewer bits."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.clone(memory_format=torch.contiguous_format))

    def forward(self) -> Tensor:
        return self.value


class Point(nn.Identity):
    """A place between operators where quantization may round activations to integers."""


class Gain(Written):
    """A factor by channel, on the last axis: 1 until channels are scaled."""

    value: Tensor
    scaled = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.ones(dim))

    def write(self, form: Form) -> None:
        super().write(form)
        self.scaled = bool((self.value != 1).any())

    def fold(self, layer: nn.Linear) -> None:
        """Moves the factor into the layer before it."""
        scale_rows(layer, self.value)
        self.value.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value if self.scaled else x


class Residual(nn.Module):
    """Addition to the residual stream; `stream`, `branch` and `sum` are what an integer addition would round."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = Gain(dim)
        self.stream, self.branch, self.sum = Point(), Point(), Point()

    def forward(self, stream: Tensor, branch: Tensor) -> Tensor:
        return self.sum(self.stream(stream) + self.branch(self.gain(branch)))


# Between tokens (B * H * W, C), row by row, and feature maps (B, C, H, W)


def tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def feature_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x.reshape(-1, *size, x.shape[1]).permute(0, 3, 1, 2)


# Norms of tokens that are centred over channels: there LayerNorm is RMS norm


class RMSNorm(Written):
    """weight * x / sqrt(mean(x^2) + eps). The weight is 1, the norm's own being in the layers behind it, until channels are scaled; the
    gain is of what it reads."""

    weight: Tensor
    factor: Tensor
    average: Tensor
    eps: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        # in ONNX the operator has a weight; if none is given, the exporter makes one of the size of x
        self.register_buffer("weight", torch.ones(dim))
        self.gain = Gain(dim)

    def write(self, form: Form) -> None:
        super().write(form)
        if form.norm == "products":  # into which the gain goes
            gain = self.gain.value
            self.register_buffer("average", (gain * gain / len(gain))[None])
            self.register_buffer("eps", torch.full((1,), NORM_EPS))
            self.register_buffer("factor", self.weight * gain)
            self.scaled = bool((self.factor != 1).any())

    def forward(self, x: Tensor) -> Tensor:
        if self.form.norm == "operator":
            return F.rms_norm(self.gain(x), self.weight.shape, self.weight, NORM_EPS)
        x = x * torch.rsqrt(F.linear(x * x, self.average, self.eps))
        return x * self.factor if self.scaled else x


class AffineNorm(RMSNorm):
    """With the affine of a LayerNorm that stands before a convolution, where it cannot be folded."""

    bias: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.weight.numel())
        self.weight.copy_(norm.weight)
        self.register_buffer("bias", norm.bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class Centre(Written):
    """x - mean(x) over channels."""

    average: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def write(self, form: Form) -> None:
        super().write(form)
        if form.norm == "products":
            self.register_buffer("average", torch.full((1, self.dim), 1 / self.dim))

    def forward(self, x: Tensor) -> Tensor:
        return x - (x.mean(-1, keepdim=True) if self.form.norm == "operator" else F.linear(x, self.average))
