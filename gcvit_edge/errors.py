"""Errors that a user can act on, and the exit code that each one gives the command line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message says what was got, what was expected and what to do. Exit code 2; nothing was written."""

    exit_code = 2


class LimitBroken(Exception):
    """Every artifact was made and checked, but one breaks the recipe's accuracy limit. Exit code 3."""

    exit_code = 3


class CheckFailed(Exception):
    """An artifact or a bundle is not what it claims: a changed file, a broken baseline; or a device or backend failed. Exit code 4."""

    exit_code = 4


class WrongAnswer(CheckFailed):
    """An artifact runs, but gives other logits than its golden ones. Exit code 5."""

    exit_code = 5


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when none is close."""
    found = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not known: names the nearest one and lists all."""
    known = list(known)
    guess = nearest(name, known)
    hint = f"did you mean {guess!r}? " if guess else ""
    return UserError(f"unknown {kind} {name!r}; {hint}known: {', '.join(known)}")
