"""What a user can put right. The command line prints these as one sentence, without traceback; exit status 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong; the message says what was given, what is wrong with it and what to set."""
