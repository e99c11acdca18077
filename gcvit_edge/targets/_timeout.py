"""How long to wait for a device: the option `timeout` of the targets that have it."""

from gcvit_edge.errors import UserError

DEFAULT_SECONDS = 120
TIMEOUT = {
    "help": f"seconds to wait for loading and for one inference; for many, ten times what they took before besides ({DEFAULT_SECONDS})"
}


def check_timeout(seconds: int) -> None:
    """Raises UserError unless it is positive."""
    if seconds < 1:
        raise UserError(f"timeout must be at least 1 second, got {seconds}")
