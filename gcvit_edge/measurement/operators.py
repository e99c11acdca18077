"""Operators of a compiled artifact, as its runtime's own profiler names and times them: what backends answer, and profiles add up."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["matrix", "quantization", "layout", "other", "unattributed"]
KINDS: dict[Kind, str] = {
    "matrix": "linears, convolutions, attention",
    "quantization": "rounding to integers and back",
    "layout": "transposes, reorders, reshapes",
    "other": "norms, softmax, GELU, additions and the like",
    "unattributed": "what the profiler gives to no operator",
}


@dataclass(frozen=True)
class TimedOperator:
    """One of them. operator: the runtime's name of its kind. ms: median over runs. integer: its products are in INT8. delegated: inside
    a delegate, in a runtime that has them."""

    name: str
    operator: str
    kind: Kind
    ms: float
    integer: bool = False
    delegated: bool = True
