"""The one exception for a user's mistake (the command line prints its message as one line and exits with 2), and how readers raise it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What was wrong, what was expected, what to do: one line, no traceback."""


class PeersLost(UserError):
    """Another process of the group has gone away: a consequence, whose cause that process knows better."""


@contextmanager
def reading(what: object, advice: str) -> Iterator[None]:
    """Turn whatever reading a missing or damaged file raises into a `UserError`; `what` names the file, `advice` says what to do.

    Damaged bytes make parsers raise anything, IndexError and RecursionError included: keep what stands inside to the reading alone.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{what} does not exist; {advice}") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{what} cannot be read ({reason}); {advice}") from None
