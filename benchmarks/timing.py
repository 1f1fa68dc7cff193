"""Times functions against each other on a machine that others use too."""

import statistics
import time
import typing


class Timing(typing.NamedTuple):
    """Seconds: the median, and the middle half of the measurements."""

    median: float
    low: float
    high: float


def alternate(functions, seconds=6.0, least=7, most=200):
    """Times every function once per round, in turn, until the time is over.

    What slows the machine down for a while slows all of them down.

    Args:
        functions: Dict from names to functions of no arguments, which return when
            their work is done.
        seconds: Time to spend, warm-up not included.
        least, most: Bounds on the number of rounds.

    Returns:
        Dict from names to `Timing`.
    """
    for function in functions.values():
        function()
        function()
    times = {name: [] for name in functions}
    start = time.perf_counter()
    for rounds in range(most):
        if rounds >= least and time.perf_counter() - start > seconds:
            break
        for name, function in functions.items():
            before = time.perf_counter()
            took = function()
            elapsed = time.perf_counter() - before
            times[name].append(took if isinstance(took, float) else elapsed)
    return {name: summary(values) for name, values in times.items()}


def summary(values):
    low, _, high = statistics.quantiles(values, n=4)
    return Timing(statistics.median(values), low, high)
