"""The bundle of a tiny network: made in seconds."""

import shutil
from pathlib import Path

import pytest
from bundles import quantize
from tiny import Tiny, make_tiny

from gcvit_edge import Bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def bundle(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("made") / "bundle"
    return quantize(tiny, output)


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.root, tmp_path / "copy"))
