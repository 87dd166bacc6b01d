"""The one exception for a user's mistake: the command line prints its message as one line and exits with 2."""


class UserError(Exception):
    """What was wrong, what was expected, what to do: one line, no traceback."""


class PeersLost(UserError):
    """Another process of the group has gone away: a consequence, whose cause that process knows better."""
