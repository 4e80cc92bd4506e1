"""The tree of operating errors, and the one table that maps each to a gRPC status, an HTTP status
and an exit code.

A message says what failed, why, and what to do. Programmer errors are not here: see `invariant`.
"""

from __future__ import annotations

from dataclasses import dataclass


class SwarmError(Exception):
    """Base of all operating errors. `message` is for people and complete in itself."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class NotFound(SwarmError):
    """What was named does not exist."""


class Conflict(SwarmError):
    """The state of the cluster forbids it: a name is taken, an object in use, a version out of
    date.
    """


class Invalid(SwarmError):
    """The request itself is wrong."""


class Denied(SwarmError):
    """The caller may not do this."""

    # Who that was, where a server knows it, for the audit trail.
    who = ""


class Removed(Denied):
    """The node was removed from the cluster: nothing in it is the node's any more."""


class Unavailable(SwarmError):
    """It cannot be done now; trying again may help."""


class NotManager(Unavailable):
    """The node runs no manager."""


class TimedOut(SwarmError):
    """It took longer than allowed; whether it happened is unknown."""


class Exhausted(SwarmError):
    """A limit was reached."""


class Unsupported(SwarmError):
    """It is known and not offered."""


class Internal(SwarmError):
    """A defect of ours."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """What an error becomes outside. `grpc` is the status code's name."""

    grpc: str
    http: int
    exit_code: int


# Exit codes 3, 6 and 7 are not errors of a call: 3 a plan with a difference, 6 not converged, 7
# rolled back.
TABLE: dict[type[SwarmError], Mapping] = {
    Invalid: Mapping("INVALID_ARGUMENT", 400, 2),
    NotFound: Mapping("NOT_FOUND", 404, 4),
    Conflict: Mapping("FAILED_PRECONDITION", 409, 5),
    Removed: Mapping("PERMISSION_DENIED", 403, 8),
    Denied: Mapping("PERMISSION_DENIED", 403, 8),
    NotManager: Mapping("UNAVAILABLE", 503, 9),
    Unavailable: Mapping("UNAVAILABLE", 503, 9),
    TimedOut: Mapping("DEADLINE_EXCEEDED", 504, 10),
    Exhausted: Mapping("RESOURCE_EXHAUSTED", 429, 11),
    Unsupported: Mapping("UNIMPLEMENTED", 501, 12),
    Internal: Mapping("INTERNAL", 500, 1),
}
EXIT_DIFFERENT = 3
EXIT_NOT_CONVERGED = 6
EXIT_ROLLED_BACK = 7
EXIT_INTERRUPTED = 130

BY_NAME: dict[str, type[SwarmError]] = {kind.__name__: kind for kind in TABLE}


def mapping(error: SwarmError) -> Mapping:
    """The outside form of an error; a class that is not in the table counts as its nearest base."""
    for kind in type(error).__mro__:
        if kind in TABLE:
            return TABLE[kind]
    return TABLE[Internal]


class InvariantError(AssertionError):
    """The program contradicts itself."""


def invariant(condition: object, message: str) -> None:
    """Raises InvariantError unless the condition holds; stays on in production."""
    if not condition:
        raise InvariantError(message)
