from collections.abc import Iterator

import pytest
from remembered import make


@pytest.fixture(scope="module", autouse=True)
def artifacts_anew(artifacts_once: None) -> Iterator[None]:
    """Making them is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcvit_edge.lower.lower_network", make)
        yield
