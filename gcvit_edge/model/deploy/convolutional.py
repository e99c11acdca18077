"""Convolutional parts: tokens in and out, row by row; `size` is the height and width of their feature map."""

import torch.nn.functional as F
from torch import Tensor, nn

from gcvit_edge.model import gcvit
from gcvit_edge.model.deploy.folding import centred, linear
from gcvit_edge.model.deploy.primitives import AffineNorm, Gain, Written, feature_map, tokens
from gcvit_edge.model.form import Form


class MBConv(Written):
    """Fused-MBConv of tokens, or of a feature map if its pointwise convolution is one."""

    def __init__(self, block: gcvit.FusedMBConv, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.depthwise = block.conv_dw
        self.squeeze, self.excite = linear(block.se.fc1.weight[:, :, 0, 0]), linear(block.se.fc2.weight[:, :, 0, 0])
        self.pointwise: nn.Linear | nn.Conv2d = linear(block.conv_pw.weight[:, :, 0, 0])
        self.gain = Gain(self.pointwise.in_features)  # of what the pointwise convolution reads

    def write(self, form: Form) -> None:
        super().write(form)
        if form.pointwise == "conv":
            weight = self.pointwise.weight
            self.pointwise = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
            self.pointwise.weight.copy_(weight[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        maps = self.form.pointwise == "conv"
        y = F.gelu(self.depthwise(x if maps else feature_map(x, self.size)))
        # the mean of a feature map, with axes kept, is the one form of it that XNNPACK has
        mean = y.mean((2, 3), keepdim=True).reshape(-1, y.shape[1])
        gate = self.gain(self.excite(F.gelu(self.squeeze(mean))).sigmoid())
        y = y * gate.reshape(-1, y.shape[1], 1, 1)
        return x + self.pointwise(y if maps else tokens(y))


class Downsample(Written):
    """Centred tokens of a feature map of `size` -> tokens of one of half the size."""

    def __init__(self, down: gcvit.Downsample, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.norm1, self.norm2 = AffineNorm(down.norm1), AffineNorm(down.norm2)
        self.conv_block = MBConv(down.conv_block, size)
        self.reduction = centred(down.reduction)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        maps = self.form.pointwise == "conv"
        x = self.conv_block(feature_map(x, self.size)) if maps else feature_map(self.conv_block(x), self.size)
        return self.norm2(tokens(self.reduction(x)))


class GlobalQuery(Written):
    """Tokens of a stage -> (B, N, C), what its blocks use in place of their own queries."""

    def __init__(self, generator: gcvit.GlobalQueryGenerator, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.blocks = nn.ModuleList()
        for block in generator.blocks:
            if isinstance(block, gcvit.FusedMBConv):
                self.blocks.append(MBConv(block, size))
            else:
                self.blocks.append(_Pool(block, size))
                size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
        self.positions = size[0] * size[1]

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[1]
        if self.form.pointwise == "conv":
            x = feature_map(x, self.size)
        for block in self.blocks:
            x = block(x)
        if self.form.pointwise == "conv":
            x = tokens(x)
        return x.reshape(-1, self.positions, dim)


class _Pool(Written):
    """3x3 max pooling of stride 2, of what `MBConv` works on."""

    def __init__(self, pool: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.pool, self.size = pool, size

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) if self.form.pointwise == "conv" else tokens(self.pool(feature_map(x, self.size)))
