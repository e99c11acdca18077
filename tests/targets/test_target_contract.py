"""One contract that every target passes; a new target is tested here unasked, unless it needs an address."""

import os
from pathlib import Path

import pytest
from target_contract import check_target

from gcvit_edge.bundle import Bundle
from gcvit_edge.errors import UserError
from gcvit_edge.targets import load_target, parse_target, target_names

NEEDS_ADDRESS = [name for name in target_names() if load_target(name).ADDRESS == "required"]


@pytest.mark.parametrize("name", [name for name in target_names() if name not in NEEDS_ADDRESS])
def test_contract(name: str, bundle: Bundle, tmp_path: Path) -> None:
    target = load_target(name)
    missing = target.missing()
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    check_target(name, "", target.Options(), bundle, tmp_path)


@pytest.mark.parametrize("name", NEEDS_ADDRESS)
def test_a_missing_address_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="needs an address"):
        parse_target(name)
