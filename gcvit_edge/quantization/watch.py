"""Looking at the activations of a network while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

See = Callable[[str, Tensor, Tensor], None]
"""(name of the module, its input, its output)"""


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
