"""What the program prints as one sentence, without traceback; everything else is a fault of the program and keeps it.

* `UserError`: a mistake of the user (exit status 2). Raised where user values enter: settings, files, options, what an
  engine hands over.
* `StopError`: a run that had to stop (exit status 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user gave is wrong; the message says what was given, what is wrong with it and what to set."""


class StopError(Exception):
    """A run cannot go on, through no fault in what the user typed; the message says what is left and how to go on."""


@contextmanager
def as_user_error(what: str = "") -> Iterator[None]:
    """A door: inside, a ValueError is about what the user gave. what : said in front of the message.

    The core, the rules and the theory raise ValueError for wrong arguments and know nothing of users; a wrong argument
    that this package itself makes must not pass a door.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what}{error}") from error
