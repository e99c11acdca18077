"""The deploy form cut into parts that follow one another, so that what is the same before a changed layer need not be computed again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from gcvit_edge.model.deploy.primitives import tokens

State = tuple[Tensor, ...]
"""What one part hands to the next: tokens, and inside a stage its global query too."""


@dataclass(frozen=True)
class Part:
    """name: of the module whose layers it holds, or of the first one. layers: names of layers begin so."""

    name: str
    layers: tuple[str, ...]
    run: Callable[[State], State]


def parts(deployed: nn.Module) -> list[Part]:
    """The parts of what `deploy` gave, in whatever form, quantized or not: the first takes (image,), the last gives (logits,).

    Modules are looked up when a part runs, so layers may be exchanged between two runs.
    """
    network = cast(Any, deployed)
    found = [Part("conv1", ("conv1",), lambda state: (tokens(network.conv1(*state)),))]
    for index, stage in enumerate(network.stages):
        name = f"stages.{index}"
        found.append(Part(name, (f"{name}.downsample.", f"{name}.global_query."), _enter(stage)))
        found += [Part(f"{name}.blocks.{i}", (f"{name}.blocks.{i}.",), _block(stage, i)) for i in range(len(stage.blocks))]
        found.append(Part(f"{name}.end", (), lambda state, stage=stage: (stage.reverse(state[0]),)))
    return [*found, Part("head", ("norm", "head"), lambda state: (network.classify(*state),))]


def _enter(stage: Any) -> Callable[[State], State]:
    def run(state: State) -> State:
        x = stage.downsample(*state)
        return stage.enter(x), stage.global_query(x)

    return run


def _block(stage: Any, index: int) -> Callable[[State], State]:
    return lambda state: (stage.blocks[index](*state), state[1])
