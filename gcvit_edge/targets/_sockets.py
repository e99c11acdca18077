"""Temporary folders for programs that make sockets in them."""

import os
import tempfile

_LONGEST = 40  # a socket's path has 107 bytes, of which Chromium's needs 64 below this folder, ssh's 41


def socket_folder() -> "tempfile.TemporaryDirectory[str]":
    """A temporary folder whose path leaves room for that of a socket: in /tmp where TMPDIR is too long."""
    folder = tempfile.gettempdir()
    short = folder if len(os.fsencode(folder)) <= _LONGEST else "/tmp"  # a new folder in it, for this user alone
    return tempfile.TemporaryDirectory(prefix="gcvit-edge-", dir=short, ignore_cleanup_errors=True)
