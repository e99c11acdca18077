"""Measurements that outlive an interruption."""

import errno
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gcvit_edge.cache import Measurements, cache_file, digest


def fails() -> Any:
    raise AssertionError("measured again")


def test_values_are_measured_once_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.jsonl"
    first = Measurements(file)
    assert first.get("a", lambda: 1.5) == 1.5
    assert first.get("a", fails) == 1.5
    assert first.get("b", lambda: {"drop": [0.1, -0.2]}) == {"drop": [0.1, -0.2]}
    again = Measurements(file)
    assert again.values == {"a": 1.5, "b": {"drop": [0.1, -0.2]}}
    assert again.get("b", fails) == {"drop": [0.1, -0.2]}


def test_a_writer_that_was_killed_loses_only_its_last_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    Measurements(file).get("a", lambda: 1)
    Measurements(file).get("b", lambda: 2)
    file.write_text(file.read_text()[:-2])
    again = Measurements(file)
    assert again.values == {"a": 1}
    again.get("b", lambda: 3)
    assert Measurements(file).values == {"a": 1, "b": 3}


def test_what_json_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Measurements(tmp_path / "x.jsonl").get("a", lambda: {"db": math.inf})


def test_a_failed_measurement_is_not_kept(tmp_path: Path) -> None:
    known = Measurements(tmp_path / "x.jsonl")
    with pytest.raises(ZeroDivisionError):
        known.get("a", lambda: 1 / 0)
    assert known.get("a", lambda: 2) == 2


def test_where_nothing_can_be_written_values_are_held(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    known = Measurements(tmp_path / "file" / "x.jsonl")
    assert known.get("a", lambda: 1) == 1
    assert known.get("a", fails) == 1


def test_where_nothing_can_be_read_values_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refused)
    assert Measurements(tmp_path / "x.jsonl").get("a", lambda: 1) == 1


def test_digest_tells_where_a_part_ends() -> None:
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    assert digest([b"a"]) == digest(["a"])
    assert len(digest([])) == 64


def test_digest_of_arrays() -> None:
    array = np.arange(300, dtype=np.int32)
    others = [array[::-1], array.reshape(150, 2), array.astype(np.int64), array.view(np.float32), array[:-1], array.tobytes()]
    assert len({digest([other]) for other in [array, *others]}) == 7
    assert digest([array]) == digest([array.copy()])
    assert digest([array[::2]]) == digest([array[::2].copy()])  # not contiguous
    assert digest([np.array("cat")]) != digest([np.array("dog")])  # of no axis


def test_the_file_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file(digest(["a"])).parent == tmp_path / "gcvit-edge" / "measurements"
