"""What went wrong, in one sentence for the person who can mend it."""


class UserError(ValueError):
    """Input that cannot be used as it is: the message says what is wrong and what to do.

    The commands print the message alone, without a traceback.
    """


class BackendUnavailable(UserError, RuntimeError):
    """A backend that was asked for by name and cannot run here."""
