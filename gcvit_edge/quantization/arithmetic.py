"""How a runtime computes in integers: a description, so that backends load without PyTorch."""

from dataclasses import dataclass
from typing import Literal

Signedness = Literal["int8", "uint8"]
Scales = Literal["static", "dynamic", "dynamic_row", "weights"]
"""Of a linear's input: fixed; found when it runs, one for the tensor, or one a row; or none: float with INT8 weights."""
ConvScales = Literal["static", "dynamic", "dynamic_image"]
"""Of a convolution's input, likewise."""


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a runtime computes in integers, where it is fastest.

    activations: integer type of static activations. linear, conv: scales of a linear's or a convolution's input. delicate: the same
    for the few linears whose rounding costs much accuracy and whose work is nothing: the head, and the gates of Fused-MBConvs.
    linear_output, conv_output: whether kernels with static scales answer in integers too.
    """

    activations: Signedness
    linear: Scales = "static"
    conv: ConvScales = "static"
    delicate: Scales = "weights"
    linear_output: bool = False
    conv_output: bool = False
