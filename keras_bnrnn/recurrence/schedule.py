"""Chooses how the time loops run. The choice affects speed only."""

import typing

from keras_bnrnn import backend

BY_STEP_FROM = 1024
LEAST_SLICED_ROWS = 8
LEAST_SLICED_PRODUCT = 2**20


class Schedule(typing.NamedTuple):
    """How a time loop runs.

    Attributes:
        unroll: Whether the loop is unrolled. T must then be static. Default: `False`.
        keeps: Whether the forward loop keeps the values that a closed-form gradient
            needs, as in training. Otherwise the forward loop saves time and memory, and
            a gradient runs the loop again. Default: `True`.
        by_step: Whether a loop leaves what it keeps unstacked, and the backward loop
            computes factors timestep by timestep. `settled` sets it. Default: `False`.
        reads_ahead: Whether a loop that keeps nothing reads the projection one timestep
            ahead. XLA does not vectorise arithmetic for CPUs if the arithmetic reads a
            slice at an index that is only known as the loop runs. A copy of the slice,
            made one timestep earlier, separates the two: a GRU then takes half the
            time. In an LSTM the tanh of all gates already separates them, and a copy
            would only cost time. Default: `False`.
    """

    unroll: bool = False
    keeps: bool = True
    reads_ahead: bool = False
    by_step: bool = False

    def settled(self, batch, units):
        """Returns the schedule of a loop over `batch` rows, an int or a tensor."""
        small = isinstance(batch, int) and batch * units < BY_STEP_FROM
        by_step = (
            backend.is_traced()
            and not self.unroll
            and not backend.has_fused_kernels()
            and not (small and backend.in_plain_graph())
        )
        return self._replace(by_step=by_step)


def rows_of_a_sliced_batch(weights):
    """Returns the least number of rows of a batch that runs in slices."""
    units, width = weights.recurrent_kernel.shape
    return max(LEAST_SLICED_ROWS, -(-LEAST_SLICED_PRODUCT // (units * width)))
