"""How a runtime computes in integers: a description, so that backends load without PyTorch."""

from dataclasses import dataclass
from typing import Literal

Signedness = Literal["int8", "uint8"]


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a runtime computes in integers, where it is fastest.

    activations: integer type of static activations. linear: scales of a linear's input, fixed or found when it runs, one for the
    tensor or one a row. linear_output, conv_output: whether its kernels answer in integers too.
    """

    activations: Signedness
    linear: Literal["static", "dynamic", "dynamic_row"] = "static"
    linear_output: bool = False
    conv_output: bool = False
