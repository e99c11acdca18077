"""Every official GC ViT shape (paper, Table 1 and Table 8; NVlabs/GCVit README), as plain data without torch."""

import math
from dataclasses import dataclass

from gcvit_edge.errors import UserError, unknown_name

STRIDE = 32  # pixels per position of the last stage: input sizes are multiples of it
_WINDOW_STRIDES = (32, 32, 16, 32)  # input pixels per window position: 7, 7, 14, 7 at 224 px


@dataclass(frozen=True, kw_only=True)
class GCViTConfig:
    """Shape of one GC ViT.

    `window_size` (positions per window side, one per stage) scales with the input when None, which keeps the number of
    windows and of global-query poolings as published. `se_multiple` rounds the squeeze-and-excitation width (dim / 4)
    up to a multiple: 1 in NVlabs' code, 8 in timm's; every official width is a multiple of 8, so only custom ones differ.
    """

    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: float
    layer_scale: float | None = None
    img_size: tuple[int, int] = (224, 224)
    window_size: tuple[int, ...] | None = None
    in_chans: int = 3
    num_classes: int = 1000
    drop_path: float = 0.0
    se_multiple: int = 1

    def __post_init__(self) -> None:
        stages = len(self.depths)
        if len(self.num_heads) != stages or (self.window_size is not None and len(self.window_size) != stages):
            raise UserError(
                f"depths={self.depths}, num_heads={self.num_heads} and window_size={self.window_size} must have one entry "
                "per stage, all the same number of them"
            )
        if stages != 4:
            raise UserError(f"depths has {stages} entries; GC ViT has 4 stages, so give 4")
        if not math.isfinite(self.mlp_ratio):
            raise UserError(f"mlp_ratio must be a number over 0, got {self.mlp_ratio}")
        if min(self.dim, self.mlp_dim(0), *self.depths, *self.num_heads, *self.img_size, self.in_chans) < 1 or self.num_classes < 0:
            raise UserError(f"every size must be positive, got {self}")
        if len(self.img_size) != 2:
            raise UserError(f"img_size is one side or (height, width), got {self.img_size}")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path is a probability below 1, got {self.drop_path}")
        for size in self.img_size:
            if size % STRIDE:
                nearest = max(STRIDE, round(size / STRIDE) * STRIDE)
                raise UserError(f"img_size {self.img_size} is not a multiple of {STRIDE} pixels; try {nearest}")
        for stage in range(stages):
            width, heads = self.stage_dim(stage), self.num_heads[stage]
            if width % heads:
                raise UserError(f"stage {stage + 1} is {width} wide, which {heads} heads do not divide; change num_heads")
            (height, width_), (window_h, window_w) = self.feature_size(stage), self.window(stage)
            levels = self.query_levels(stage)
            if (window_h << levels, window_w << levels) != (height, width_):
                raise UserError(
                    f"stage {stage + 1} has {height}x{width_} positions, which is not its {window_h}x{window_w} window "
                    "times a power of two; leave window_size out to have it scaled with img_size"
                )

    def stage_dim(self, stage: int) -> int:
        """Channels of a stage (0 to 3)."""
        return self.dim << stage

    def mlp_dim(self, stage: int) -> int:
        """Hidden units of a stage's MLPs, rounded down; but for a millionth, since the quotient of two widths, times one, may be just below
        the other."""
        return int(self.stage_dim(stage) * self.mlp_ratio + 1e-6)

    def feature_size(self, stage: int) -> tuple[int, int]:
        """Positions (height, width) of a stage's feature map."""
        height, width = self.img_size
        return height // (4 << stage), width // (4 << stage)

    def window(self, stage: int) -> tuple[int, int]:
        """Positions (height, width) of one attention window of a stage."""
        if self.window_size is not None:
            return self.window_size[stage], self.window_size[stage]
        height, width = self.img_size
        return height // _WINDOW_STRIDES[stage], width // _WINDOW_STRIDES[stage]

    def query_levels(self, stage: int) -> int:
        """How often the global query generator halves the feature map to reach the window size (paper, section 3.2)."""
        return max(0, (self.feature_size(stage)[0] // max(1, self.window(stage)[0])).bit_length() - 1)

    def se_dim(self, dim: int) -> int:
        """Width of the squeeze-and-excitation bottleneck of a convolution block `dim` wide."""
        return max(1, -(-(dim // 4) // self.se_multiple)) * self.se_multiple


def _variant(dim: int, depths: tuple[int, ...], mlp_ratio: float, layer_scale: float | None, img_size: int = 224) -> GCViTConfig:
    heads = dim // 32  # heads are 32 wide in every official variant
    return GCViTConfig(
        dim=dim,
        depths=depths,
        num_heads=(heads, heads * 2, heads * 4, heads * 8),
        mlp_ratio=mlp_ratio,
        layer_scale=layer_scale,
        img_size=(img_size, img_size),
    )


VARIANTS = {
    "gcvit_xxtiny": _variant(64, (2, 2, 6, 2), 3.0, None),
    "gcvit_xtiny": _variant(64, (3, 4, 6, 5), 3.0, None),
    "gcvit_tiny": _variant(64, (3, 4, 19, 5), 3.0, None),
    "gcvit_tiny2": _variant(64, (3, 4, 29, 5), 3.0, None),
    "gcvit_small": _variant(96, (3, 4, 19, 5), 2.0, 1e-5),
    "gcvit_small2": _variant(96, (3, 4, 23, 5), 3.0, 1e-5),
    "gcvit_base": _variant(128, (3, 4, 19, 5), 2.0, 1e-5),
    "gcvit_large": _variant(192, (3, 4, 19, 5), 2.0, 1e-5),
    "gcvit_large_224_21k": _variant(192, (3, 4, 19, 5), 2.0, 1e-5),
    "gcvit_large_384_21k": _variant(192, (3, 4, 19, 5), 2.0, 1e-5, 384),
    "gcvit_large_512_21k": _variant(192, (3, 4, 19, 5), 2.0, 1e-5, 512),
}


def variant_config(name: str) -> GCViTConfig:
    """The shape of an official variant; NVlabs' spelling (`gc_vit_xxtiny`) is accepted too.

    Raises:
        UserError: the name is unknown; the message names the nearest one.
    """
    key = name.replace("gc_vit", "gcvit")
    if key not in VARIANTS:
        raise unknown_name("model", name, VARIANTS)
    return VARIANTS[key]


def check_takes_rgb(config: GCViTConfig) -> None:
    """Refuses a network that image files cannot be given to.

    Raises:
        UserError: it does not take 3 channels.
    """
    if config.in_chans != 3:
        count = f"{config.in_chans} channel{'' if config.in_chans == 1 else 's'}"
        raise UserError(f"the model takes {count}, and images are read as RGB; give one of 3 channels")


def nvlabs_crop(name: str) -> tuple[float, bool]:
    """Evaluation crop of NVlabs' own weights: (crop_pct, squash), from the configurations of the NVlabs/GCVit repository."""
    whole = {"gcvit_xxtiny", "gcvit_tiny", "gcvit_base"}
    squash = name in {"gcvit_large_384_21k", "gcvit_large_512_21k"}
    return (1.0 if name in whole or name.startswith("gcvit_large") else 0.875), squash
