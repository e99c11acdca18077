"""A session with a process, whatever that process answers."""

import os
import resource
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from gcvit_edge.artifact import Artifact
from gcvit_edge.errors import CheckFailed
from gcvit_edge.targets._process import LocalFolder, ProcessSession, profile_file
from gcvit_edge.targets._timeout import patience

ARTIFACT = Artifact("executorch", "int8", Path("model.int8.pte"), (Path("model.int8.pte"),))
READY = '{"load_ms": 1, "runtime_rss_mb": 2, "runtime": "r", "runtime_version": "1"}'


def shell(script: str) -> Sequence[str]:
    return ["sh", "-c", script]


def failure(script: str, timeout: float | None = 20) -> str:
    """What is said of a process that loads, answers the first command with `script`, within `timeout` seconds, and is asked no more."""
    with ProcessSession(ARTIFACT, shell(f"echo '{READY}'; read line; {script}"), LocalFolder(), 20) as session:
        session._timeout = timeout
        with pytest.raises(CheckFailed, match=r"model\.int8\.pte does not run in executorch") as failed:
            session.time(np.zeros((1, 3, 2, 2), np.float32), 2)
    return str(failed.value)


@pytest.mark.parametrize("answer", ["hello", "{}", "[1]", r"\0377"])
def test_an_answer_that_is_none(answer: str) -> None:
    with pytest.raises(CheckFailed, match="expected an answer of the runner with load_ms, runtime_rss_mb, runtime, runtime_version"):
        ProcessSession(ARTIFACT, shell(f"printf '%b\\n' '{answer}'; sleep 20"), LocalFolder())
    assert "expected an answer of the runner with ms, joules" in failure(f"printf '%b\\n' '{answer}'; sleep 20")


def test_what_it_printed_is_told() -> None:
    assert failure("echo no model >&2; exit 3").endswith("(process ended with 3):\nno model\n")
    assert "(process was killed, perhaps for want of memory)" in failure("kill -9 $$")


def test_no_answer_in_time() -> None:
    assert "(no answer within 1 s; give it longer with --timeout)" in failure("sleep 20", 0.5)


def test_an_answer_without_an_end() -> None:
    assert "(no answer within 1 s; give it longer with --timeout)" in failure("while :; do printf x; sleep 0.1; done", 0.5)


def test_a_timeout_that_is_as_good_as_none() -> None:
    with ProcessSession(ARTIFACT, shell(f"echo '{READY}'; cat"), LocalFolder(), 10**9) as session:
        assert session.load_ms == 1


def test_many_inferences_are_not_waited_for_as_long_as_each_alone() -> None:
    script = f"""echo '{READY}'; read line; echo '{{"ms": [20, 10], "joules": {{}}}}'; sleep 20"""
    with ProcessSession(ARTIFACT, shell(script), LocalFolder(), 20) as session:
        assert patience(20, 32, session._longest) == 640  # nothing is known yet
        session.time(np.zeros((1, 3, 2, 2), np.float32), 2)
        assert patience(20, 32, session._longest) == pytest.approx(20 + 10 * 32 * 0.02)
        assert patience(20, 1, session._longest) == 20
        session._timeout = 0.2
        with pytest.raises(CheckFailed, match="no answer within 1 s"):
            session.time(np.zeros((1, 3, 2, 2), np.float32), 4)


def test_descriptors_past_1024(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a program has that holds hundreds of sessions."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < 1200:
        pytest.skip(f"this process may have {most} descriptors only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, 1200), most))
    try:
        with ExitStack() as held:
            for _ in range(1030):
                held.enter_context(open(os.devnull))
            with ProcessSession(ARTIFACT, shell(f"echo '{READY}'; cat"), LocalFolder(), 20) as session:
                assert session.load_ms == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def test_several_answers_at_once_and_one_in_parts(tmp_path: Path) -> None:
    script = f"""
        printf '%s' '{READY[:20]}'; sleep 0.3; echo '{READY[20:]}'
        read -r line; set -- $line
        head -c 16 /dev/zero > "$3"
        printf '{{"done": 1}}\n{{"done": 1}}\n{{"finished": true}}\n'
        read -r line
        echo '{{"peak_rss_mb": 3.5}}'
    """
    seen: list[None] = []
    with ProcessSession(ARTIFACT, shell(script), LocalFolder(), 20) as session:
        logits = session.infer(np.zeros((2, 3, 2, 2), np.float32), lambda: seen.append(None))
        assert logits.shape == (2, 2)
        assert len(seen) == 2
        assert session.peak_rss_mb() == 3.5


def test_logits_that_are_cut_off() -> None:
    script = f"""
        echo '{READY}'; read -r line; set -- $line
        head -c 30 /dev/zero > "$3"
        printf '{{"done": 1}}\n{{"done": 1}}\n{{"finished": true}}\n'
    """
    said = pytest.raises(CheckFailed, match="got 30 bytes of logits of 2 images")
    with ProcessSession(ARTIFACT, shell(script), LocalFolder(), 20) as session, said:
        session.infer(np.zeros((2, 3, 2, 2), np.float32), lambda: None)


def test_an_interruption_is_not_hidden_by_what_fails_at_the_end() -> None:
    class Stuck(LocalFolder):
        def remove(self) -> None:
            super().remove()
            raise CheckFailed("the board does not answer")

    command = [sys.executable, "-c", f"print({READY!r}, flush=True); input()"]
    with pytest.raises(KeyboardInterrupt), ProcessSession(ARTIFACT, command, Stuck()):
        raise KeyboardInterrupt
    with pytest.raises(CheckFailed, match="does not answer"), ProcessSession(ARTIFACT, command, Stuck()):
        pass


def test_a_profile_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckFailed, match=r"cannot make the folder of profiles .*file: File exists"):
        profile_file(tmp_path / "file", ARTIFACT)
