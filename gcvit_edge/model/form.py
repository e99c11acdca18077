"""How a backend wants the deploy form written: a description, so that backends load without PyTorch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a backend wants the deploy form written.

    norm: "operator" keeps the RMS norm; "products" writes it with a product, elementwise operators and rsqrt.
    attention: "operator" keeps attention whole, as ONNX's Attention. The others write it with products: "windows" of rank 4, (windows,
    heads, N, N), with the global query repeated for every window; "bmm" of rank 3, with the global query in one product with
    the keys of all windows.
    pointwise: 1x1 convolutions as a "linear" of tokens, where changing between tokens and feature maps is free, or as "conv", which
    leaves convolutional parts less often.
    gains: where what is added to the residual stream has a factor by channel behind it, which kernels that answer in integers want
    (see quantization/equalization.py): after attention and MLPs, "all", after MLPs, "mlp", or nowhere, "none". Else it is folded into
    the weights.
    """

    norm: Literal["operator", "products"] = "operator"
    attention: Literal["operator", "windows", "bmm"] = "windows"
    pointwise: Literal["linear", "conv"] = "linear"
    gains: Literal["all", "mlp", "none"] = "all"
