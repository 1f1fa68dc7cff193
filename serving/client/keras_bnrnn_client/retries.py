"""Deadlines, and sending a request again until one is reached."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from .errors import DeadlineExceeded, ServingError

_Answer = TypeVar("_Answer")

# Seconds before the first retry, and at most before a later one.
_FIRST_DELAY, _LONGEST_DELAY = 0.05, 2.0


class Deadline:
    """A point in time.

    Args:
        seconds: float, how far away it is.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """The seconds that are left; not positive once it is past."""
        return self._end - time.monotonic()

    def require(self, cause: ServingError | None = None) -> float:
        """The seconds that are left.

        Raises:
            DeadlineExceeded: if there are none. It quotes `cause`.
        """
        remaining = self.remaining()
        if remaining <= 0:
            raise self.exceeded(cause) from cause
        return remaining

    def exceeded(self, cause: Exception | None = None) -> DeadlineExceeded:
        """The error of this deadline, which quotes `cause`."""
        last = "" if cause is None else f"; the last error was: {cause}"
        return DeadlineExceeded(
            f"There was no answer within {self.seconds:g} s{last}", "DEADLINE_EXCEEDED"
        )


def call_with_retries(
    call: Callable[[float], _Answer], deadline: Deadline, retries: int
) -> _Answer:
    """Calls until there is an answer.

    The delay doubles from one retry to the next, up to 2 s, and half of it is random,
    so that the clients of a server that was away do not return all at once.

    Args:
        call: function of the seconds that are left.
        deadline: `Deadline` over all calls and delays.
        retries: int, how many times to call again after a retriable error.

    Returns:
        What `call` returned.

    Raises:
        ServingError: the last one.
    """
    longest = _FIRST_DELAY
    error = None
    for remaining_retries in range(retries, -1, -1):
        try:
            return call(deadline.require(error))
        except ServingError as latest:
            if not latest.retriable or not remaining_retries:
                raise
            error = latest
        delay = longest * random.uniform(0.5, 1.0)
        if delay >= deadline.remaining():
            raise deadline.exceeded(error) from error
        time.sleep(delay)
        longest = min(2 * longest, _LONGEST_DELAY)
    raise AssertionError  # the last round returns or raises
