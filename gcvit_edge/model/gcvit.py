"""GC ViT: Global Context Vision Transformer (Hatamizadeh et al., ICML 2023, arXiv:2206.09959), the training form.

Images are (B, in_chans, H, W) float. Convolutional parts work on (B, C, H, W), transformer blocks on (B, H, W, C).
Parameter names are those of timm's `gcvit` models, so that one safetensors file loads in either.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcvit_edge.errors import UserError
from gcvit_edge.model.variants import GCViTConfig

NORM_EPS = 1e-5


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) tensor."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Channel gate from the global average: x * sigmoid(W2 gelu(W1 mean(x))), without biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * self.fc2(F.gelu(self.fc1(gate))).sigmoid()


class FusedMBConv(nn.Module):
    """The paper's Fused-MBConv (equation 2): depthwise 3x3, GELU, SE, pointwise 1x1, residual. Keeps the shape."""

    def __init__(self, dim: int, se_dim: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.se = SqueezeExcite(dim, se_dim)
        self.conv_pw = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_pw(self.se(F.gelu(self.conv_dw(x))))


class Downsample(nn.Module):
    """Halves the resolution (section 3.3): norm, Fused-MBConv, 3x3 convolution of stride 2, norm."""

    def __init__(self, dim: int, out_dim: int, se_dim: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=NORM_EPS)
        self.conv_block = FusedMBConv(dim, se_dim)
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False)
        self.norm2 = LayerNorm2d(out_dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.reduction(self.conv_block(self.norm1(x))))


class Stem(nn.Module):
    """Image to patches of 4x4 pixels: 3x3 convolution of stride 2, then a downsampler of the same width."""

    def __init__(self, in_chans: int, dim: int, se_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1)
        self.down = Downsample(dim, dim, se_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.conv1(x))


class GlobalQueryGenerator(nn.Module):
    """Global query of a stage (section 3.2): Fused-MBConv and 3x3 max pooling until one window is left.

    (B, C, H, W) -> (B, C, window height, window width). With `levels` 0 it is one Fused-MBConv without pooling.
    """

    def __init__(self, dim: int, se_dim: int, levels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        for level in range(1, max(1, levels) + 1):
            self.blocks.add_module(f"conv{level}", FusedMBConv(dim, se_dim))
            if levels:
                self.blocks.add_module(f"pool{level}", nn.MaxPool2d(3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class RelativePositionBias(nn.Module):
    """Learned bias per head and relative position inside a window, as in Swin: forward() is (heads, N, N)."""

    relative_position_index: Tensor

    def __init__(self, window: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        height, width = window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        row_shift = rows.flatten()[:, None] - rows.flatten()[None, :] + height - 1
        col_shift = cols.flatten()[:, None] - cols.flatten()[None, :] + width - 1
        self.register_buffer("relative_position_index", row_shift * (2 * width - 1) + col_shift, persistent=False)

    def forward(self) -> Tensor:
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)


class WindowAttention(nn.Module):
    """Self-attention inside windows: local (queries of the window) or global (queries of the whole image, equation 3)."""

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int], use_global: bool) -> None:
        super().__init__()
        self.num_heads, self.use_global = num_heads, use_global
        self.rel_pos = RelativePositionBias(window, num_heads)
        self.qkv = nn.Linear(dim, dim * (2 if use_global else 3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, q_global: Tensor) -> Tensor:
        """`x` (B * windows, N, C), image-major; `q_global` (B, N, C). Returns the shape of `x`."""
        windows, tokens, dim = x.shape
        heads = [part.view(windows, tokens, self.num_heads, -1).transpose(1, 2) for part in self.qkv(x).split(dim, -1)]
        if self.use_global:
            q = q_global.view(-1, tokens, self.num_heads, dim // self.num_heads).transpose(1, 2)
            # windows are image-major: an image's query must stay with its own windows
            q = q.repeat_interleave(windows // q.shape[0], dim=0)
            k, v = heads
        else:
            q, k, v = heads
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.rel_pos())
        return self.proj(x.transpose(1, 2).reshape(windows, tokens, dim))


class LayerScale(nn.Module):
    """Per-channel gain of a residual branch (CaiT)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the residual branch of an image with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class Mlp(nn.Module):
    """Two linears with GELU between, on the last axis."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Transformer block: window attention and MLP, pre-norm, with residuals. (B, H, W, C) in and out."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int],
        use_global: bool,
        mlp_dim: int,
        layer_scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = WindowAttention(dim, num_heads, window, use_global)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, mlp_dim)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, q_global: Tensor) -> Tensor:
        windows = partition_windows(self.norm1(x), self.window)
        attended = reverse_windows(self.attn(windows, q_global), self.window, x.shape[1], x.shape[2])
        x = x + self.drop_path(self.ls1(attended))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def partition_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B * windows, window positions, C), image-major, windows and positions row by row."""
    batch, height, width, dim = x.shape
    rows, cols = window
    x = x.view(batch, height // rows, rows, width // cols, cols, dim)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * cols, dim)


def reverse_windows(x: Tensor, window: tuple[int, int], height: int, width: int) -> Tensor:
    """Inverse of `partition_windows`: back to (B, height, width, C)."""
    rows, cols = window
    x = x.view(-1, height // rows, width // cols, rows, cols, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


class Stage(nn.Module):
    """Downsampler (but for the first stage), global query, and blocks that alternate local and global attention."""

    def __init__(self, config: GCViTConfig, stage: int, drop_path: list[float]) -> None:
        super().__init__()
        dim = config.stage_dim(stage)
        self.downsample = Downsample(dim // 2, dim, config.se_dim(dim // 2)) if stage else nn.Identity()
        self.global_block = GlobalQueryGenerator(dim, config.se_dim(dim), config.query_levels(stage))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.num_heads[stage],
                config.window(stage),
                use_global=index % 2 == 1,
                mlp_dim=config.mlp_dim(stage),
                layer_scale=config.layer_scale,
                drop_path=rate,
            )
            for index, rate in enumerate(drop_path)
        )
        last = stage == len(config.depths) - 1
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        q_global = self.global_block(x).flatten(2).transpose(1, 2)
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x, q_global)
        return self.norm(x).permute(0, 3, 1, 2)


class Head(nn.Module):
    """Average over positions, then one linear to the logits."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class GCViT(nn.Module):
    """The network: (B, in_chans, H, W) float image -> (B, num_classes) logits.

    With `num_classes` 0 there is no head, and forward() returns the feature maps of the four stages,
    [(B, dim * 2**i, H / (4 * 2**i), W / (4 * 2**i)) for i in 0..3].
    """

    def __init__(self, config: GCViTConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config.in_chans, config.dim, config.se_dim(config.dim))
        # drop path grows linearly over all blocks of the network, as in the official training
        last = max(1, sum(config.depths) - 1)
        rates = [config.drop_path * index / last for index in range(sum(config.depths))]
        self.stages = nn.ModuleList(Stage(config, stage, [rates.pop(0) for _ in range(depth)]) for stage, depth in enumerate(config.depths))
        self.head = Head(config.stage_dim(3), config.num_classes) if config.num_classes else None
        self.apply(_init_weights)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the four stages, each (B, C, H, W); the last one is normalised.

        Raises:
            UserError: the image has another shape than the model was created for.
        """
        expected = (self.config.in_chans, *self.config.img_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise UserError(
                f"expected a batch of images of shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}; "
                "resize the images, or create the model with another img_size or in_chans"
            )
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        features = self.forward_features(x)
        return features if self.head is None else self.head(features[-1])


def _init_weights(module: nn.Module) -> None:
    """Truncated normal for linears (as in the official training); convolutions keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
