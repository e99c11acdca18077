"""Saved training runs: those that cannot be saved, and damaged ones."""

from pathlib import Path

import pytest
import torch

from gcvit_edge.errors import CheckFailed, UserError
from gcvit_edge.training.state import check_state, read_state, write_state


def test_a_run_that_cannot_be_saved_is_no_bad_input(tmp_path: Path) -> None:
    (tmp_path / "mine.run").mkdir()  # in the way of what is written
    with pytest.raises(CheckFailed, match=r"cannot save the run to .*; see to that \(is there room\?\), then --resume"):
        write_state(tmp_path / "mine.run", {}, {})


def test_a_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "mine.run").mkdir()
    for resume, force in ((False, False), (True, False), (False, True)):
        with pytest.raises(UserError, match=r"the run is saved to .*mine\.run while it goes on, which is a folder; move it away"):
            check_state(tmp_path / "mine.run", resume, force)


def test_whatever_is_damaged_is_said_to_be(tmp_path: Path) -> None:
    """Of a file in which one piece after the other is blank, which PyTorch finds in many places."""
    path = tmp_path / "mine.run"
    write_state(path, {"seed": 0}, {"step": 3, "weights": torch.ones(4)})
    whole = path.read_bytes()
    refused = 0
    for start in range(0, len(whole) - 6, 3):
        path.write_bytes(whole[:start] + bytes(6) + whole[start + 6 :])
        try:
            read_state(path, {"seed": 0})
        except UserError:
            refused += 1
    assert refused > 50
