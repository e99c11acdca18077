"""A search for what stays float, in seconds: of a tiny network with one layer that INT8 ruins."""

from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny

from gcvit_edge import search
from gcvit_edge.bundle import Bundle
from gcvit_edge.pipeline import quantize
from gcvit_edge.targets.local import time_artifacts


def order_times(patch: pytest.MonkeyPatch, faster: str) -> None:
    """The result and the safe choice have the times that were measured, but the one of them that is named has the shorter one."""

    def timed(artifacts: Any, *more: Any) -> Any:
        timings = time_artifacts(artifacts, *more)
        return [*timings[:2], *sorted(timings[2:], key=lambda timing: timing.percentile(50), reverse=faster == "safe")]

    patch.setattr(search, "time_artifacts", timed)


def hurry(patch: pytest.MonkeyPatch, cache: Path) -> None:
    order_times(patch, "chosen")  # of so small networks, timed so shortly, either may be the faster one
    patch.setattr("gcvit_edge.pipeline.TIMED_ROUNDS", 2)
    patch.setattr(search, "TIMED_ROUNDS", 2)
    patch.setenv("XDG_CACHE_HOME", str(cache))


def searched(tiny: Tiny, output: Path, **options: Any) -> Bundle:
    return quantize(
        str(options.pop("recipe", tiny.recipe)), weights=tiny.weights, calib=tiny.calib, eval=tiny.evaluation, output=output, threads=1,
        backends=options.pop("backends", ["onnx"]), **options,
    )  # fmt: skip


def make_searched(tiny: Tiny, folder: Path) -> None:
    """ONNX Runtime's `bundle` in `folder`, by a search that began with an empty `cache` and was not interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch, folder / "cache")
        searched(tiny, folder / "bundle")
