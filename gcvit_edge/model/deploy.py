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
- The global query is never mixed up between images; written as products, it is multiplied with the keys of all windows of its
  image in one product, never tiled.

The form is built once, in the way that `Form()` says, which is the one that quantization works on: weights are changed and ranges
observed there. `rewrite` then writes it as each backend wants it, with the same weights and the same names of layers.

The batch size is fixed when the form is exported; in PyTorch any batch runs.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcvit_edge.model import gcvit
from gcvit_edge.model.folding import centred, fold_affine, fold_residual, linear, scale_rows
from gcvit_edge.model.form import Form
from gcvit_edge.model.gcvit import NORM_EPS


def deploy(model: gcvit.GCViT) -> nn.Module:
    """The deploy form of a classifier: (B, in_chans, H, W) float32 -> (B, num_classes). `model` is not changed.

    Raises:
        ValueError: the model has no head (`num_classes` 0, or `features_only`).
    """
    if model.head is None:
        raise ValueError("the deploy form needs a classifier, but this model has no head; create it with num_classes > 0")
    with torch.no_grad():
        return _Network(copy.deepcopy(model)).eval()  # parts of the copy live on in it


def rewrite(deployed: nn.Module, form: Form) -> nn.Module:
    """A copy of what `deploy` gave, written as `form` says; names of layers and shapes of weights stay, but 1x1 convolutions have
    two more axes where the form wants them as such."""
    written = copy.deepcopy(deployed)
    with torch.no_grad():
        for module in list(written.modules()):
            if isinstance(module, _Written):
                module.write(form)
    return written


class _Written(nn.Module):
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


class Gain(_Written):
    """A factor by channel of the output of a layer, on its last axis: 1 until channels are scaled."""

    value: Tensor
    scaled = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.ones(dim))

    def write(self, form: Form) -> None:
        super().write(form)
        self.scaled = bool((self.value != 1).any())

    def fold(self, layer: nn.Linear | nn.Conv2d) -> None:
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


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _feature_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x.reshape(-1, *size, x.shape[1]).permute(0, 3, 1, 2)


# Norms of tokens that are centred over channels: there LayerNorm is RMS norm


class RMSNorm(_Written):
    """weight * x / sqrt(mean(x^2) + eps). The weight is 1, the norm's own being in the layers behind it, until channels are scaled."""

    weight: Tensor
    average: Tensor
    eps: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        # in ONNX the operator has a weight; if none is given, the exporter makes one of the size of x
        self.register_buffer("weight", torch.ones(dim))

    def write(self, form: Form) -> None:
        super().write(form)
        if form.norm == "products":
            dim = self.weight.numel()
            self.register_buffer("average", torch.full((1, dim), 1 / dim))
            self.register_buffer("eps", torch.full((1,), NORM_EPS))
            self.scaled = bool((self.weight != 1).any())

    def forward(self, x: Tensor) -> Tensor:
        if self.form.norm == "operator":
            return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)
        x = x * torch.rsqrt(F.linear(x * x, self.average, self.eps))
        return x * self.weight if self.scaled else x


class AffineNorm(RMSNorm):
    """With the affine of a LayerNorm that stands before a convolution, where it cannot be folded."""

    bias: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.weight.numel())
        self.weight.copy_(norm.weight)
        self.register_buffer("bias", norm.bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class _Centre(_Written):
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


# Attention and blocks on tokens (B * windows * N, C), windows one after the other


class Attention(_Written):
    """Window attention on normalised tokens; `query` is (B, N, C), used by global blocks only."""

    head_major = False

    def __init__(self, block: gcvit.Block, windows: int) -> None:
        super().__init__()
        attention = block.attn
        weight, bias = fold_affine(block.norm1, attention.qkv)
        dim = weight.shape[1]
        weights, biases = list(weight.split(dim)), list(bias.split(dim))
        scale = (dim // attention.num_heads) ** -0.5
        weights[0], biases[0] = weights[0] * scale, biases[0] * scale  # q of a local block, k of a global one
        self.q = None if attention.use_global else linear(weights[0], biases[0])
        self.k = linear(weights[-2], biases[-2])
        self.v = linear(weights[-1], biases[-1])
        self.proj = fold_residual(attention.proj, block.ls1)
        position_bias = attention.rel_pos().contiguous()
        self.heads, self.tokens = position_bias.shape[:2]
        self.windows = windows
        self.position_bias = Constant(position_bias[None])
        self.query, self.key, self.softmax, self.value = Point(), Point(), Point(), Point()
        self.scores, self.attended = Point(), Point()  # what the products answer

    def write(self, form: Form) -> None:
        super().write(form)
        # scores (B * heads, windows, N, N) of global blocks with several windows, which want a bias of (heads, 1, N, N)
        self.head_major = self.q is None and self.windows > 1 and form.attention == "bmm"
        if self.head_major:
            self.position_bias = Constant(self.position_bias()[0, :, None])

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        if self.head_major:
            values = self._attend_image(x, query)
        else:
            q = self._every_window(query) if self.q is None else self.q(x)
            values = (self._attend_whole if self.form.attention == "operator" else self._attend_window)(q, self.k(x), self.v(x))
        return self.proj(self._moved(values.reshape(x.shape), self.attended))

    def _every_window(self, query: Tensor) -> Tensor:
        """(B, N, C) -> (B * windows * N, C)."""
        repeated = query if self.windows == 1 else query[:, None].expand(-1, self.windows, -1, -1)
        return repeated.reshape(-1, query.shape[2])

    def _attend_whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(-1, self.tokens, x.shape[1]) for x in (q, k, v))
        return torch.onnx.ops.attention(q, k, v, self.position_bias(), q_num_heads=self.heads, kv_num_heads=self.heads, scale=1.0)[0]

    def _attend_window(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key = self._heads(q, self.tokens, self.query), self._heads(k, self.tokens, self.key, transpose=True)
        scores = self._product(query, key, self.query, self.key, self.scores) + self.position_bias()
        weights, value = self.softmax(scores.softmax(-1)), self._heads(v, self.tokens, self.value)
        return self._moved(self._product(weights, value, self.softmax, self.value, self.attended).permute(0, 2, 1, 3), self.attended)

    def _attend_image(self, x: Tensor, query: Tensor) -> Tensor:
        image, images = self.windows * self.tokens, query.shape[0]
        query = self._heads(query.reshape(-1, x.shape[1]), self.tokens, self.query)
        key = self._heads(self.k(x), image, self.key, transpose=True)
        scores = self._product(query, key, self.query, self.key, self.scores)  # (B, heads, N, windows * N)
        scores = scores.reshape(-1, self.tokens, self.windows, self.tokens).permute(0, 2, 1, 3)
        bias = self.position_bias()
        if images > 1:
            bias = bias.repeat(images, 1, 1, 1)
        value = self._heads(self.v(x), image, self.value).reshape(-1, self.windows, self.tokens, x.shape[1] // self.heads)
        weights = self.softmax((scores + bias).softmax(-1))
        values = self._product(weights, value, self.softmax, self.value, self.attended)  # (B * heads, windows, N, head width)
        values = self._moved(values.reshape(images, self.heads, image, -1), self.attended)
        return self._moved(values.permute(0, 2, 1, 3), self.attended)

    def _heads(self, x: Tensor, tokens: int, point: Point, transpose: bool = False) -> Tensor:
        """(groups * tokens, C) -> (groups, heads, tokens, head width), or with the last two axes exchanged."""
        x = self._moved(x.reshape(-1, tokens, self.heads, x.shape[1] // self.heads), point)
        return point(x.permute(0, 2, 3, 1) if transpose else x.permute(0, 2, 1, 3))

    def _product(self, a: Tensor, b: Tensor, left: Point, right: Point, result: Point) -> Tensor:
        """The product of what was rounded at `left` and `right`."""
        if self.form.attention == "windows":
            return result(a @ b)
        flat = result(torch.bmm(left(a.reshape(-1, *a.shape[2:])), right(b.reshape(-1, *b.shape[2:]))))
        return self._moved(flat.view(*a.shape[:2], *flat.shape[1:]), result)

    def _moved(self, x: Tensor, point: Point) -> Tensor:
        """Once more rounded at a point, which changes nothing: XNNPACK moves integers only between two roundings."""
        return point(x) if self.form.attention == "bmm" else x


class Block(_Written):
    """Attention and MLP with their residuals, on centred tokens, which they keep centred."""

    def __init__(self, block: gcvit.Block, windows: int) -> None:
        super().__init__()
        dim = block.norm1.weight.numel()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attention = Attention(block, windows)
        self.fc1 = linear(*fold_affine(block.norm2, block.mlp.fc1))
        self.fc2 = fold_residual(block.mlp.fc2, block.ls2)
        self.residual1, self.residual2 = Residual(dim), Residual(dim)

    def write(self, form: Form) -> None:
        super().write(form)
        if "linear" not in form.gains:
            self.residual1.gain.fold(self.attention.proj)
            self.residual2.gain.fold(self.fc2)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        x = self.residual1(x, self.attention(self.norm1(x), query))
        return self.residual2(x, self.fc2(F.gelu(self.fc1(self.norm2(x)))))


# Convolutional parts: tokens in and out, row by row; `size` is the height and width of their feature map


class MBConv(_Written):
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
        y = F.gelu(self.depthwise(x if maps else _feature_map(x, self.size)))
        # the mean of a feature map, with axes kept, is the one form of it that XNNPACK has
        mean = y.mean((2, 3), keepdim=True).reshape(-1, y.shape[1])
        gate = self.gain(self.excite(F.gelu(self.squeeze(mean))).sigmoid())
        y = y * gate.reshape(-1, y.shape[1], 1, 1)
        return x + self.pointwise(y if maps else _tokens(y))


class Downsample(_Written):
    """Centred tokens of a feature map of `size` -> tokens of one of half the size."""

    def __init__(self, down: gcvit.Downsample, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.norm1, self.norm2 = AffineNorm(down.norm1), AffineNorm(down.norm2)
        self.conv_block = MBConv(down.conv_block, size)
        self.reduction = centred(down.reduction)
        self.gain = Gain(self.reduction.out_channels)

    def write(self, form: Form) -> None:
        super().write(form)
        if "conv" not in form.gains:
            self.gain.fold(self.reduction)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        maps = self.form.pointwise == "conv"
        x = self.conv_block(_feature_map(x, self.size)) if maps else _feature_map(self.conv_block(x), self.size)
        return self.norm2(self.gain(_tokens(self.reduction(x))))


class _GlobalQuery(_Written):
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
            x = _feature_map(x, self.size)
        for block in self.blocks:
            x = block(x)
        if self.form.pointwise == "conv":
            x = _tokens(x)
        return x.reshape(-1, self.positions, dim)


class _Pool(_Written):
    """3x3 max pooling of stride 2, of what `MBConv` works on."""

    def __init__(self, pool: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.pool, self.size = pool, size

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) if self.form.pointwise == "conv" else _tokens(self.pool(_feature_map(x, self.size)))


# Stages: tokens in and out, row by row as (B * H * W, C)


class _Stage(nn.Module):
    def __init__(self, model: gcvit.GCViT, index: int) -> None:
        super().__init__()
        config, stage = model.config, model.stages[index]
        assert isinstance(stage, gcvit.Stage)
        self.dim, self.size, self.window = config.stage_dim(index), config.feature_size(index), config.window(index)
        self.rows, self.cols = self.size[0] // self.window[0], self.size[1] // self.window[1]
        down = stage.downsample if isinstance(stage.downsample, gcvit.Downsample) else model.stem.down
        self.downsample = Downsample(down, (2 * self.size[0], 2 * self.size[1]))
        self.global_query = _GlobalQuery(stage.global_block, self.size)
        self.centre = _Centre(self.dim)
        blocks: list[gcvit.Block] = list(stage.blocks)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(Block(block, self.rows * self.cols) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Centred tokens (B * 2H * 2W, C_in) -> centred tokens (B * H * W, C)."""
        x = self.downsample(x)
        query = self.global_query(x)
        x = self._partition(self.centre(x))
        for block in self.blocks:
            x = block(x, query)  # which keeps it centred
        return self._reverse(x)

    def _partition(self, x: Tensor) -> Tensor:
        """(B * H * W, C) -> (B * windows * N, C)."""
        if self.rows * self.cols > 1:
            x = x.reshape(-1, self.window[0], self.cols, self.window[1] * self.dim).permute(0, 2, 1, 3)
        return x.reshape(-1, self.dim)

    def _reverse(self, x: Tensor) -> Tensor:
        """(B * windows * N, C) -> (B * H * W, C), row by row."""
        if self.rows * self.cols > 1:
            x = x.reshape(-1, self.cols, self.window[0], self.window[1] * self.dim).permute(0, 2, 1, 3)
        return x.reshape(-1, self.dim)


class _Network(nn.Module):
    def __init__(self, model: gcvit.GCViT) -> None:
        super().__init__()
        assert model.head is not None  # deploy() has checked
        config = model.config
        self.conv1 = centred(model.stem.conv1)
        self.stages = nn.ModuleList(_Stage(model, index) for index in range(len(config.depths)))
        self.size, self.dim = config.feature_size(3), config.stage_dim(3)
        self.norm = RMSNorm(self.dim)
        last_norm = model.stages[-1].norm
        assert isinstance(last_norm, nn.LayerNorm)
        self.head = linear(*fold_affine(last_norm, model.head.fc))

    def forward(self, image: Tensor) -> Tensor:
        x = _tokens(self.conv1(image))
        for stage in self.stages:
            x = stage(x)
        x = _feature_map(self.norm(x), self.size).mean((2, 3), keepdim=True)
        return self.head(x.reshape(-1, self.dim))
