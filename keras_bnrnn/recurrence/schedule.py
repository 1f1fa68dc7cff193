"""Chooses how the time loops run. The choice affects speed only."""

import typing

# A recurrent kernel of at most this size is transposed before the backward loop. On
# CPUs this made training steps 5 to 9 % faster at 128 units, and 5 to 9 % slower at 250
# and 650 units, where the product reads an untransposed kernel equally fast.
TRANSPOSED_AT_MOST = 2**17


class Schedule(typing.NamedTuple):
    """How a time loop runs.

    Attributes:
        unroll: Whether the loop is unrolled. T must then be static. Default: `False`.
        keeps: Whether the forward loop keeps the values that a closed-form gradient
            needs, as in training. Otherwise the forward loop saves time and memory, and
            a gradient runs the loop again. Default: `True`.
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


def transposes(kernel):
    """Returns whether the backward loop transposes the recurrent kernel in advance.

    Args:
        kernel: Tensor of shape (U, G*U).
    """
    return kernel.shape[0] * kernel.shape[1] <= TRANSPOSED_AT_MOST
