"""Why a request is not answered, as the client is told."""

from recbole_ssm.errors import UserError


class Refused(UserError):
    """A request that is not answered.

    Args:
        status: of HTTP.
        kind: a word for programs, the error's ``type``.
        message: one sentence for people.
    """

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind = status, kind


def store_gone(why: object) -> Refused:
    """The store of sessions does not answer; ``why`` holds no address, which may hold a password."""
    return Refused(503, "store_gone", f"the store of sessions does not answer ({why}): ask again in a second.")
