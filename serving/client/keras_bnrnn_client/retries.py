"""Repeats calls after transient errors, until a deadline."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from .errors import DeadlineExceeded, ServingError

_Answer = TypeVar("_Answer")

# Longest delay before the first retry and before any retry, in seconds.
_FIRST_DELAY, _LONGEST_DELAY = 0.05, 2.0


class Deadline:
    """A deadline for a call.

    Args:
        seconds: float, the time from now to the deadline.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Returns the remaining seconds; not positive after the deadline."""
        return self._end - time.monotonic()

    def require(self, cause: ServingError | None = None) -> float:
        """Returns the remaining seconds, which are positive.

        Raises:
            DeadlineExceeded: If the deadline has passed. The message contains `cause`.
        """
        remaining = self.remaining()
        if remaining <= 0:
            raise self.exceeded(cause) from cause
        return remaining

    def exceeded(self, cause: Exception | None = None) -> DeadlineExceeded:
        """Returns the error of this deadline; its message contains `cause`."""
        last = "" if cause is None else f"; the last error was: {cause}"
        return DeadlineExceeded(
            f"There was no answer within {self.seconds:g} s{last}", "DEADLINE_EXCEEDED"
        )


def call_with_retries(
    call: Callable[[float], _Answer], deadline: Deadline, retries: int
) -> _Answer:
    """Calls a function, and calls it again after retriable errors.

    The delay doubles with each retry, up to 2 s. Half of the delay is random, so that
    clients do not all retry at the same time when a server returns.

    Args:
        call: Function of the remaining seconds.
        deadline: `Deadline` for all calls and delays.
        retries: int, the largest number of retries.

    Returns:
        The result of `call`.

    Raises:
        ServingError: The error of the last call.
        DeadlineExceeded: If the deadline passes.
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
    raise AssertionError  # unreachable: the last iteration returns or raises
