"""How much each layer's rounding disturbs the logits: rounded alone in a float network, or alone left float in a rounded one.

Measured without labels or gradients, as the SQNR of the logits. All layers of a part of the network (`model.deploy.parts`) share what is
computed before it, so a layer costs the rest of a forward pass, not a whole one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gcvit_edge.cache import Measurements
from gcvit_edge.measurement.accuracy import sqnr_db
from gcvit_edge.measurement.parity import finite_db
from gcvit_edge.model.deploy.parts import State, parts
from gcvit_edge.progress import Advance
from gcvit_edge.quantization.keep import layer_names
from gcvit_edge.quantization.watch import watching

Image = NDArray[np.float32]
Kind = Literal["alone", "without"]


def rounded_layers(network: nn.Module, quantized: nn.Module) -> list[str]:
    """Names of the layers (`layer_names`) that `quantized` has in integers, in the order of the network."""

    def kinds(layer: nn.Module) -> list[type[nn.Module]]:
        return [type(module) for module in layer.modules()]

    return [name for name in layer_names(network) if kinds(network.get_submodule(name)) != kinds(quantized.get_submodule(name))]


@torch.no_grad()
def logits(network: nn.Module, images: Sequence[Image]) -> NDArray[np.float32]:
    """(N, classes) of images (1, C, H, W), one at a time: scales that are found when a layer runs are those of one image."""
    return np.concatenate([network(torch.from_numpy(image)).numpy() for image in images])


@torch.no_grad()
def exchange(
    network: nn.Module, quantized: nn.Module, names: Sequence[str], images: Sequence[Image], known: Measurements, kind: Kind,
    advance: Advance,
) -> dict[str, float]:  # fmt: skip
    """SQNR in dB of the logits against those of the float `network`, for each of the layers `names`.

    kind: "alone", when it alone is that of `quantized`; "without", when all others are. Images are (1, C, H, W). Both networks are as
    before afterwards. What is measured is kept in `known` as "KIND LAYER"; if all is known, nothing runs.
    """
    base, other = (network, quantized) if kind == "alone" else (quantized, network)
    complete = all(f"{kind} {name}" in known.values for name in names)
    reference = np.empty((0, 0), np.float32) if complete else logits(network, images)
    steps = parts(base)
    states: list[list[State]] = []  # of every part, what each image gives it
    for index, step in enumerate(steps):
        inside = [name for name in names if name.startswith(step.layers)] if step.layers else []
        missing = [name for name in inside if f"{kind} {name}" not in known.values]
        if missing:
            while len(states) <= index:  # only as far as something is missing
                done = len(states)
                states.append([steps[done - 1].run(state) for state in states[-1]] if done else [(torch.from_numpy(x),) for x in images])
                if done:
                    states[done - 1] = []  # is not needed again
        for name in inside:
            known.get(f"{kind} {name}", lambda name=name, index=index: _sqnr(base, other, name, steps[index:], states[index], reference))
            advance()
    return {name: known.values[f"{kind} {name}"] for name in names}


def _sqnr(base: nn.Module, other: nn.Module, name: str, steps: Sequence[Any], states: list[State], reference: NDArray[np.float32]) -> float:
    with exchanged(base, other, [name]):
        changed = []
        for state in states:
            for step in steps:
                state = step.run(state)
            changed.append(state[0].numpy())
    return finite_db(sqnr_db(np.concatenate(changed), reference))


@contextmanager
def exchanged(base: nn.Module, other: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Inside, `base` has these layers of `other`."""
    before = {name: base.get_submodule(name) for name in names}
    try:
        for name in before:
            _put(base, name, other.get_submodule(name))
        yield
    finally:
        for name, module in before.items():
            _put(base, name, module)


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


@torch.no_grad()
def work(network: nn.Module, names: Sequence[str], image: Image) -> dict[str, int]:
    """Multiplications of one inference by layer; of points, the numbers that they round. image: (1, C, H, W). A point is called more than
    once where a runtime needs it so, for the same numbers."""
    counted: dict[str, int] = {}

    modules = {name: network.get_submodule(name) for name in names}

    def count(name: str, x: Tensor, y: Tensor) -> None:
        module = modules[name]
        each = module.weight[0].numel() if isinstance(module, nn.Linear | nn.Conv2d) else 1
        counted[name] = max(counted.get(name, 0), y.numel() * each)

    with watching(modules, count):
        network(torch.from_numpy(image))
    return {name: counted[name] for name in names}


def identity(network: nn.Module, fitted: Mapping[str, Tensor]) -> Iterator[str | NDArray[Any]]:
    """What a network and what was fitted to its rounding are, for `cache.digest`: names, types and contents."""
    for name, module in network.named_modules():
        yield f"{name} {type(module).__name__}"
    for name, tensor in [*network.state_dict().items(), *fitted.items()]:
        yield f"{name} {tensor.dtype}"
        yield tensor.contiguous().view(torch.uint8).numpy()
