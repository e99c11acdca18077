"""One contract that every target passes; a new target is tested here unasked, unless it needs an address."""

import os
from pathlib import Path

import pytest
from target_contract import check_target

from gcvit_edge.bundle import Bundle
from gcvit_edge.targets import load_target, target_names

NEEDS_HARDWARE = {"cuda"}  # that machines for continuous integration do not have
STARTED_BY_THEIR_TESTS = {"ssh", "adb"}  # which bring a device of their own


@pytest.mark.parametrize("name", [name for name in target_names() if name not in STARTED_BY_THEIR_TESTS])
def test_contract(name: str, pte_bundle: Bundle, weights: Path, tmp_path: Path) -> None:
    target = load_target(name)
    missing = target.missing("")
    if missing and os.environ.get("CI") == "true" and name not in NEEDS_HARDWARE:
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    options = target.Options(weights=weights) if name == "cuda" else target.Options()
    check_target(name, "", options, pte_bundle, tmp_path)
