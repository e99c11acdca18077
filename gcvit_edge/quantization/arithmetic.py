"""How a runtime computes in integers: a description, so that backends load without PyTorch."""

from dataclasses import dataclass
from typing import Literal

Signedness = Literal["int8", "uint8"]
Scales = Literal["static", "dynamic", "dynamic_row", "weights"]
"""Of a linear's input: fixed; found when it runs, one for the tensor, or one a row; or none: float with INT8 weights."""
ConvScales = Literal["static", "dynamic", "dynamic_image"]
"""Of a convolution's input: fixed; found when it runs, one for the tensor, or one an image (a pixel, of a 1x1 convolution)."""

GroupedScales = Literal["weights", "dynamic_row", "dynamic_block"]
"""Of the input of a linear with INT4 weights: none, one a row, or one for each 32 channels of a row."""


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a runtime computes in integers, where it is fastest.

    activations: integer type of static activations. linear, mlp, conv: scales of the input of a linear, of one of an MLP, of a
    convolution. delicate: the same for the few linears whose rounding costs much accuracy and whose work is nothing: the head, and the
    gates of Fused-MBConvs. late_pointwise: the same for those 1x1 convolutions of the last two stages that are linears: there one image's
    range is far from another's (None: as other linears). last_mlp: the same for MLPs of the last stage, where GELU has few values (None:
    as other MLPs). grouped: the same for linears whose weights are INT4 in groups, where
    activations are integers at all.
    static_linear: linears with static scales as such, or as the 1x1 convolutions that they are too, whose kernels are others.
    linear_output: whether kernels of linears with static scales answer in integers too. symmetric_right: whether the right factor of
    a product of two activations needs a zero point of 0.
    """

    activations: Signedness
    linear: Scales = "static"
    mlp: Scales = "static"
    conv: ConvScales = "static"
    delicate: Scales = "weights"
    late_pointwise: Scales | None = None
    last_mlp: Scales | None = None
    grouped: GroupedScales = "weights"
    static_linear: Literal["linear", "conv"] = "linear"
    linear_output: bool = False
    symmetric_right: bool = False
