"""How long to wait for a device: the option `timeout` of the targets that have it; and waiting for what a program says."""

import select
from typing import IO

from gcvit_edge.errors import UserError

DEFAULT_SECONDS = 120
TIMEOUT = {
    "help": f"seconds to wait for loading and for one inference; for many, ten times what they took before besides ({DEFAULT_SECONDS})"
}


_SLOWER = 10  # times, that an inference may become on a device that is hot or busy
_MOST_MILLISECONDS = 2**31 - 1  # that poll() takes: 24 days


def readable(pipe: IO[bytes], seconds: float | None) -> bool:
    """Whether a program says something, or ends, within so many seconds; None waits for ever.

    Not by select(), which takes no descriptor from 1,024 on: there are as many where many sessions are open. Nor by epoll, which forgets
    a pipe that another thread closes, and then waits for ever; poll() still sees its end.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(None if seconds is None else min(1000 * seconds, _MOST_MILLISECONDS)))


def check_timeout(seconds: int) -> None:
    """Raises UserError unless it is positive."""
    if seconds < 1:
        raise UserError(f"timeout must be at least 1 second, got {seconds}")


def patience(timeout: float, inferences: int, longest: float | None) -> float:
    """Seconds to wait for so many inferences: of many, no more than a few times what they took before. longest: seconds of one, of those
    that were timed."""
    known = inferences * timeout if longest is None else timeout + _SLOWER * inferences * longest
    return min(inferences * timeout, known)
