"""Attention and blocks on tokens (B * windows * N, C), windows one after the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gcvit_edge.model import gcvit
from gcvit_edge.model.deploy.folding import fold_affine, fold_residual, linear
from gcvit_edge.model.deploy.primitives import Constant, Point, Residual, RMSNorm, Written
from gcvit_edge.model.form import Form


class Attention(Written):
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


class Block(Written):
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
        if form.gains != "all":
            self.residual1.gain.fold(self.attention.proj)
        if form.gains == "none":
            self.residual2.gain.fold(self.fc2)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        x = self.residual1(x, self.attention(self.norm1(x), query))
        return self.residual2(x, self.fc2(F.gelu(self.fc1(self.norm2(x)))))
