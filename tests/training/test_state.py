"""Saved training runs that cannot be saved."""

from pathlib import Path

import pytest

from gcvit_edge.errors import CheckFailed
from gcvit_edge.training.state import write_state


def test_a_run_that_cannot_be_saved_is_no_bad_input(tmp_path: Path) -> None:
    (tmp_path / "mine.run").mkdir()  # in the way of what is written
    with pytest.raises(CheckFailed, match=r"cannot save the run to .*; make room, then --resume"):
        write_state(tmp_path / "mine.run", {}, {})
