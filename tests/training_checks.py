"""What tests of both kinds of training ask: that two runs are the same to the bit, and an interruption in the middle of one."""

from typing import Any

import torch
from torch import Tensor, nn


def tensors(value: Any, name: str = "") -> dict[str, Any]:
    """All that a saved state holds, by name, without the times."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, inner in items for key, leaf in tensors(inner, f"{name}/{part}").items()}
    return {} if name.endswith("/seconds") else {name: value}


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit."""
    a, b = tensors(a), tensors(b)
    assert set(a) == set(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name], name


def interrupt_after(model: nn.Module, passes: int) -> None:
    """Makes a network end like a press of Ctrl-C in a forward pass."""
    seen: list[None] = []

    def count(module: nn.Module, inputs: Any) -> None:
        seen.append(None)
        if len(seen) > passes:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(count)
