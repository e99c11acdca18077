"""One contract that every target passes; a new target is tested here unasked, unless it needs an address."""

import os
from pathlib import Path

import pytest
from target_contract import check_target

from gcvit_edge.bundle import Bundle
from gcvit_edge.targets import load_target, target_names


@pytest.mark.parametrize("name", [name for name in target_names() if load_target(name).ADDRESS == "none"])
def test_contract(name: str, pte_bundle: Bundle, tmp_path: Path) -> None:
    target = load_target(name)
    missing = target.missing()
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    check_target(name, "", target.Options(), pte_bundle, tmp_path)
