"""Stages and the whole network: tokens in and out of a stage, row by row as (B * H * W, C)."""

from torch import Tensor, nn

from gcvit_edge.model import gcvit
from gcvit_edge.model.deploy.attention import Block
from gcvit_edge.model.deploy.convolutional import Downsample, GlobalQuery
from gcvit_edge.model.deploy.folding import centred, fold_affine, linear
from gcvit_edge.model.deploy.primitives import Centre, Gain, RMSNorm, feature_map, tokens


class Stage(nn.Module):
    def __init__(self, model: gcvit.GCViT, index: int) -> None:
        super().__init__()
        config, stage = model.config, model.stages[index]
        assert isinstance(stage, gcvit.Stage)
        self.dim, self.size, self.window = config.stage_dim(index), config.feature_size(index), config.window(index)
        self.rows, self.cols = self.size[0] // self.window[0], self.size[1] // self.window[1]
        down = stage.downsample if isinstance(stage.downsample, gcvit.Downsample) else model.stem.down
        self.downsample = Downsample(down, (2 * self.size[0], 2 * self.size[1]))
        self.global_query = GlobalQuery(stage.global_block, self.size)
        self.centre, self.gain = Centre(self.dim), Gain(self.dim)
        blocks: list[gcvit.Block] = list(stage.blocks)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(Block(block, self.rows * self.cols) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Centred tokens (B * 2H * 2W, C_in) -> centred tokens (B * H * W, C)."""
        x = self.downsample(x)
        query = self.global_query(x)
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, query)  # which keeps it centred
        return self.reverse(x)

    def enter(self, x: Tensor) -> Tensor:
        """Tokens (B * H * W, C) -> the residual stream of the blocks, (B * windows * N, C)."""
        x = self.gain(self.centre(x))
        if self.rows * self.cols > 1:
            x = x.reshape(-1, self.window[0], self.cols, self.window[1] * self.dim).permute(0, 2, 1, 3)
        return x.reshape(-1, self.dim)

    def reverse(self, x: Tensor) -> Tensor:
        """(B * windows * N, C) -> (B * H * W, C), row by row."""
        if self.rows * self.cols > 1:
            x = x.reshape(-1, self.cols, self.window[0], self.window[1] * self.dim).permute(0, 2, 1, 3)
        return x.reshape(-1, self.dim)


class Network(nn.Module):
    def __init__(self, model: gcvit.GCViT) -> None:
        super().__init__()
        assert model.head is not None  # deploy() has checked
        config = model.config
        self.conv1 = centred(model.stem.conv1)
        self.stages = nn.ModuleList(Stage(model, index) for index in range(len(config.depths)))
        self.size, self.dim = config.feature_size(3), config.stage_dim(3)
        self.norm = RMSNorm(self.dim)
        last_norm = model.stages[-1].norm
        assert isinstance(last_norm, nn.LayerNorm)
        self.head = linear(*fold_affine(last_norm, model.head.fc))

    def forward(self, image: Tensor) -> Tensor:
        x = tokens(self.conv1(image))
        for stage in self.stages:
            x = stage(x)
        return self.classify(x)

    def classify(self, x: Tensor) -> Tensor:
        """Tokens of the last stage (B * H * W, C) -> logits (B, classes)."""
        x = feature_map(self.norm(x), self.size).mean((2, 3), keepdim=True)
        return self.head(x.reshape(-1, self.dim))
