"""What went wrong, in one sentence for the person who can mend it."""


class UserError(ValueError):
    """Input that cannot be used as it is: the message says what is wrong and what to do.

    The commands print the message alone, without a traceback.
    """


class CannotWrite(UserError):
    """A file or folder that a run writes and cannot: the disk is full or read-only, or something is in the way."""


class BackendUnavailable(UserError, RuntimeError):
    """A backend that was asked for by name and cannot run here."""
