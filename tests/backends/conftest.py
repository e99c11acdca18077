import pytest


@pytest.fixture(scope="module", autouse=True)
def artifacts_of_backends(artifacts_anew: None) -> None:
    """Every test here makes its own."""
