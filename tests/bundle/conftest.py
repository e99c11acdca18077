"""The bundle of a tiny network: made in seconds."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import quantize
from tiny import Tiny, make_tiny

from gcvit_edge import Bundle, open_bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def bundle(tiny: Tiny, made_once: Callable[..., Path]) -> Bundle:
    return open_bundle(made_once("tiny", lambda folder: quantize(tiny, folder / "bundle")) / "bundle")


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.root, tmp_path / "copy"))
