"""Looking at the activations of a network while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gcvit_edge.measurement.accuracy import check_finite

See = Callable[[str, Tensor, Tensor], None]
"""(name of the module, its input, its output)"""


def show(network: nn.Module, image: NDArray[np.float32]) -> None:
    """Runs a network on `image` (B, C, H, W) for the sake of what watches it.

    Raises:
        CheckFailed: its logits are not finite, so what was seen is not either.
    """
    check_finite(network(torch.from_numpy(image)).numpy())


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Inside, `see` is called whenever one of `modules` has run."""

    def hook(name: str, _: nn.Module, inputs: Any, output: Any) -> None:
        see(name, inputs[0], output)

    handles = [module.register_forward_hook(partial(hook, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
