"""The deploy form: the same function as `gcvit.GCViT`, written as runtimes want it, with converted weights.

Exact rewrites (same logits up to float rounding), each for a reason:

- GC ViT never shifts its windows, so a stage partitions once on entry and reverses once on exit, each as one rank-4
  transpose; a stage of one window does neither. Between them tokens are a matrix (B * windows * N, C).
- Every tensor has rank <= 4: QNN, Vulkan, Core ML and LiteRT GPU refuse or slow down higher ranks.
- q, k and v are three linears; the attention scale is folded into q (local) or k (global); the affine of LayerNorm into
  the linears behind it; layer scale into proj and fc2; the relative position bias is a constant.
- The global query is multiplied with the keys of all windows of its image in one product: never tiled, never mixed up
  between images.
- Form "rms" is for runtimes without a good LayerNorm: the layers that write the residual stream are centred over channels,
  so every LayerNorm of the stream becomes an RMS norm, and means become products with a constant row of 1 / C.

The batch size is fixed when the form is exported; in PyTorch any batch runs.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcvit_edge.model import gcvit
from gcvit_edge.model.gcvit import NORM_EPS


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a backend wants the deploy form written.

    norm: "layer_norm" keeps the operator; "rms" writes every norm with products, elementwise operators and rsqrt.
    product_rank: rank of the operands of the attention products, 3 (one batch axis) or 4 (windows and heads apart).
    """

    norm: Literal["layer_norm", "rms"] = "layer_norm"
    product_rank: Literal[3, 4] = 4


def deploy(model: gcvit.GCViT, form: Form) -> nn.Module:
    """The deploy form of a classifier: (B, in_chans, H, W) float32 -> (B, num_classes). `model` is not changed.

    Raises:
        ValueError: the model has no head (`num_classes` 0, or `features_only`).
    """
    if model.head is None:
        raise ValueError("the deploy form needs a classifier, but this model has no head; create it with num_classes > 0")
    with torch.no_grad():
        return _Network(copy.deepcopy(model), form).eval()  # parts of the copy live on in it


# Weights: (out, in) and bias (out,) of linears, folded


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear


def _fold_affine(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """linear(x * gamma + beta) as one linear of x."""
    return linear.weight * norm.weight, linear.bias + linear.weight @ norm.bias


def _fold_residual(linear: nn.Linear, layer_scale: nn.Module, form: Form) -> nn.Linear:
    """A linear that writes the residual stream: layer scale folded in, centred over its outputs for form "rms"."""
    weight, bias = linear.weight, linear.bias
    if isinstance(layer_scale, gcvit.LayerScale):
        weight, bias = weight * layer_scale.gamma[:, None], bias * layer_scale.gamma
    if form.norm == "rms":
        weight, bias = weight - weight.mean(0), bias - bias.mean()
    return _linear(weight, bias)


# Norms over the last axis


class _StreamNorm(nn.Module):
    """Norm of the residual stream, without affine: LayerNorm, or RMS norm of an already centred stream."""

    average: Tensor

    def __init__(self, dim: int, form: Form) -> None:
        super().__init__()
        self.dim, self.form = dim, form
        if form.norm == "rms":
            self.register_buffer("average", torch.full((1, dim), 1 / dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.form.norm == "layer_norm":
            return F.layer_norm(x, (self.dim,), eps=NORM_EPS)
        return x * torch.rsqrt(F.linear(x * x, self.average) + NORM_EPS)


class _AffineNorm(nn.Module):
    """LayerNorm with affine, around convolutions, where neither centring nor affine can move elsewhere.

    `channels` is the axis: -1 for (..., C), 1 for (B, C, H, W).
    """

    average: Tensor

    def __init__(self, norm: nn.LayerNorm, form: Form, channels: Literal[-1, 1]) -> None:
        super().__init__()
        self.channels, self.form = channels, form
        dim = norm.weight.numel()
        shape = (dim, 1, 1) if channels == 1 and form.norm == "rms" else (dim,)
        self.weight = nn.Parameter(norm.weight.reshape(shape).clone())
        self.bias = nn.Parameter(norm.bias.reshape(shape).clone())
        if form.norm == "rms":
            self.register_buffer("average", torch.full((1, *shape), 1 / dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.form.norm == "layer_norm":
            last = x.permute(0, 2, 3, 1) if self.channels == 1 else x
            x = F.layer_norm(last, last.shape[-1:], self.weight, self.bias, NORM_EPS)
            return x.permute(0, 3, 1, 2) if self.channels == 1 else x
        mean = F.conv2d if self.channels == 1 else F.linear
        x = x - mean(x, self.average)
        return x * torch.rsqrt(mean(x * x, self.average) + NORM_EPS) * self.weight + self.bias


# Attention and blocks on tokens (B * windows * N, C)


class _Attention(nn.Module):
    """Window attention on normalised tokens; `query` is (B, heads, N, head width), used by global blocks only."""

    position_bias: Tensor

    def __init__(self, block: gcvit.Block, windows: int, form: Form) -> None:
        super().__init__()
        attention = block.attn
        weight, bias = _fold_affine(block.norm1, attention.qkv)
        dim = weight.shape[1]
        weights, biases = list(weight.split(dim)), list(bias.split(dim))
        scale = (dim // attention.num_heads) ** -0.5
        weights[0], biases[0] = weights[0] * scale, biases[0] * scale  # q of a local block, k of a global one
        self.q = None if attention.use_global else _linear(weights[0], biases[0])
        self.k = _linear(weights[-2], biases[-2])
        self.v = _linear(weights[-1], biases[-1])
        self.proj = _fold_residual(attention.proj, block.ls1, form)
        position_bias = attention.rel_pos().contiguous()
        self.heads, self.tokens = position_bias.shape[:2]
        self.windows, self.product_rank = windows, form.product_rank
        # head-major scores (B * heads, windows, N, N) of global blocks with several windows want (heads, 1, N, N)
        self.head_major = attention.use_global and windows > 1
        position_bias = position_bias[:, None] if self.head_major else position_bias[None]
        self.register_buffer("position_bias", position_bias.clone(memory_format=torch.contiguous_format))

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        attend = self._attend_image if self.head_major else self._attend_window
        return self.proj(attend(x, query).reshape(x.shape))

    def _attend_window(self, x: Tensor, query: Tensor) -> Tensor:
        q = query if self.q is None else self._heads(self.q(x), self.tokens)
        scores = self._product(q, self._heads(self.k(x), self.tokens, transpose=True)) + self.position_bias
        values = self._product(scores.softmax(-1), self._heads(self.v(x), self.tokens))
        return values.permute(0, 2, 1, 3)

    def _attend_image(self, x: Tensor, query: Tensor) -> Tensor:
        image = self.windows * self.tokens
        scores = self._product(query, self._heads(self.k(x), image, transpose=True))  # (B, heads, N, windows * N)
        scores = scores.reshape(-1, self.tokens, self.windows, self.tokens).permute(0, 2, 1, 3)
        images = query.shape[0]
        bias = self.position_bias if images == 1 else self.position_bias.repeat(images, 1, 1, 1)
        values = self._heads(self.v(x), image).reshape(-1, self.windows, self.tokens, x.shape[1] // self.heads)
        values = self._product((scores + bias).softmax(-1), values)  # (B * heads, windows, N, head width)
        return values.reshape(images, self.heads, image, -1).permute(0, 2, 1, 3)

    def _heads(self, x: Tensor, tokens: int, transpose: bool = False) -> Tensor:
        """(groups * tokens, C) -> (groups, heads, tokens, head width), or with the last two axes exchanged."""
        x = x.view(-1, tokens, self.heads, x.shape[1] // self.heads)
        return x.permute(0, 2, 3, 1) if transpose else x.permute(0, 2, 1, 3)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.product_rank == 4:
            return a @ b
        flat = torch.bmm(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:]))
        return flat.view(*a.shape[:2], *flat.shape[1:])


class _Block(nn.Module):
    def __init__(self, block: gcvit.Block, windows: int, form: Form) -> None:
        super().__init__()
        dim = block.norm1.weight.numel()
        self.norm1 = _StreamNorm(dim, form)
        self.attention = _Attention(block, windows, form)
        self.norm2 = _StreamNorm(dim, form)
        self.fc1 = _linear(*_fold_affine(block.norm2, block.mlp.fc1))
        self.fc2 = _fold_residual(block.mlp.fc2, block.ls2, form)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), query)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


# Stages: tokens in and out, row by row as (B * H * W, C)


class _Downsample(nn.Module):
    """(B, C_in, 2H, 2W) -> (B, H, W, C), with both norms on the last axis where it is free."""

    def __init__(self, down: gcvit.Downsample, form: Form) -> None:
        super().__init__()
        self.conv_block, self.reduction = down.conv_block, down.reduction
        self.norm2 = _AffineNorm(down.norm2, form, channels=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.reduction(self.conv_block(x)).permute(0, 2, 3, 1))


class _Stage(nn.Module):
    average: Tensor

    def __init__(self, model: gcvit.GCViT, index: int, form: Form) -> None:
        super().__init__()
        config, stage = model.config, model.stages[index]
        assert isinstance(stage, gcvit.Stage)
        self.dim, self.size, self.window = config.stage_dim(index), config.feature_size(index), config.window(index)
        self.rows, self.cols = self.size[0] // self.window[0], self.size[1] // self.window[1]
        self.heads, self.form = config.num_heads[index], form
        if isinstance(stage.downsample, gcvit.Downsample):
            self.norm1 = _AffineNorm(stage.downsample.norm1, form, channels=-1)
            self.downsample = _Downsample(stage.downsample, form)
        self.first = index == 0
        self.global_query = stage.global_block
        blocks: list[gcvit.Block] = list(stage.blocks)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(_Block(block, self.rows * self.cols, form) for block in blocks)
        if form.norm == "rms":
            self.register_buffer("average", torch.full((1, self.dim), 1 / self.dim))

    def forward(self, x: Tensor) -> Tensor:
        """First stage: (B, H, W, C) of the stem. Later ones: tokens (B * 2H * 2W, C / 2) of the stage before."""
        height, width = self.size
        if not self.first:
            x = self.norm1(x).view(-1, 2 * height, 2 * width, self.dim // 2)
            x = self.downsample(x.permute(0, 3, 1, 2))
        query = self.global_query(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        query = query.reshape(-1, self.window[0] * self.window[1], self.heads, self.dim // self.heads).permute(0, 2, 1, 3)
        x = self._partition(x)
        if self.form.norm == "rms":
            x = x - F.linear(x, self.average)  # the blocks keep the stream centred
        for block in self.blocks:
            x = block(x, query)
        return self._reverse(x)

    def _partition(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B * windows * N, C)."""
        if self.rows * self.cols > 1:
            x = x.reshape(-1, self.window[0], self.cols, self.window[1] * self.dim).permute(0, 2, 1, 3)
        return x.reshape(-1, self.dim)

    def _reverse(self, x: Tensor) -> Tensor:
        """(B * windows * N, C) -> (B * H * W, C), row by row."""
        if self.rows * self.cols > 1:
            x = x.view(-1, self.cols, self.window[0], self.window[1] * self.dim).permute(0, 2, 1, 3)
        return x.reshape(-1, self.dim)


class _Network(nn.Module):
    def __init__(self, model: gcvit.GCViT, form: Form) -> None:
        super().__init__()
        assert model.head is not None  # deploy() has checked
        config = model.config
        self.conv1 = model.stem.conv1
        self.norm1 = _AffineNorm(model.stem.down.norm1, form, channels=1)
        self.downsample = _Downsample(model.stem.down, form)
        self.stages = nn.ModuleList(_Stage(model, index, form) for index in range(len(config.depths)))
        self.size, self.dim = config.feature_size(3), config.stage_dim(3)
        self.norm = _StreamNorm(self.dim, form)
        last_norm = model.stages[-1].norm
        assert isinstance(last_norm, nn.LayerNorm)
        self.head = _linear(*_fold_affine(last_norm, model.head.fc))

    def forward(self, image: Tensor) -> Tensor:
        x = self.downsample(self.norm1(self.conv1(image)))
        for stage in self.stages:
            x = stage(x)
        # the mean over positions as the mean of a feature map: the one form of it that XNNPACK has
        x = self.norm(x).view(-1, *self.size, self.dim).permute(0, 3, 1, 2).mean((2, 3), keepdim=True)
        return self.head(x.view(-1, self.dim))
