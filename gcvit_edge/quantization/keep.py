"""Layers that stay float, by name: of linears and convolutions, of points, the activations that attention would round, and of additions
to the residual stream. An addition is one layer: with its stream alone in float, rounded by the addition before it all the same,
XNNPACK's partitioner finds no order for its operators."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from gcvit_edge.errors import UserError, nearest
from gcvit_edge.model.deploy import Point, Residual


def layer_names(deployed: nn.Module) -> list[str]:
    """What can be kept float, in the order of the network; the same names in every `Form`."""
    additions = {name for name, module in deployed.named_modules() if isinstance(module, Residual)}
    return [
        name for name, module in deployed.named_modules()
        if name in additions or (isinstance(module, nn.Linear | nn.Conv2d | Point) and name.rpartition(".")[0] not in additions)
    ]  # fmt: skip


def kept_layers(deployed: nn.Module, patterns: Iterable[str]) -> frozenset[str]:
    """The layers of a deploy form that match any of these names or patterns (those of `fnmatch`: * ? [abc]).

    Raises:
        UserError: a pattern that matches nothing; the message names the nearest layer.
    """
    names = layer_names(deployed)
    kept: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            parts = {part for name in names for part in _parts(name)}
            guess = nearest(pattern, sorted(parts if "*" in pattern else parts.union(names)))
            hint = f"did you mean {guess!r}?" if guess else f"such as {names[1]!r} or 'stages.0.*'"
            raise UserError(f"keep_float: {pattern!r} matches no layer of the network; {hint}")
        kept |= matched
    return frozenset(kept)


def _parts(name: str) -> list[str]:
    """Patterns for the modules that a layer is in: "stages.0.*", "stages.0.blocks.*", ..."""
    steps = name.split(".")
    return [".".join(steps[:length]) + ".*" for length in range(1, len(steps))]
