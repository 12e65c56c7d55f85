"""The one exception for what a person can fix."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in files, options or folders: its one-line message says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
