"""How the time loops run: what decides their speed, and nothing else."""

import typing

# A recurrent kernel of at most as many numbers is transposed before the backward loop.
# On CPUs that made training steps 5 to 9 % faster at 128 units, and as much slower at
# 250 and 650, where the product reads the kernel across just as well.
TRANSPOSED_AT_MOST = 2**17


class Schedule(typing.NamedTuple):
    """How a time loop runs.

    Attributes:
        unroll: Whether the loop is written out; T must be static.
        keeps: With a derivative: whether the forward loop keeps the values that the
            gradient needs, as training wants it. Otherwise it spends neither time nor
            memory on them, and a gradient runs the loop again.
        reads_ahead: Whether a loop that keeps nothing reads the projection one timestep
            ahead. In XLA's programs for CPUs arithmetic is not vectorised if it reads
            a slice at an index that is only known as the loop runs. A copy of the
            slice, made one turn before, separates the two: a GRU then takes half the
            time. An LSTM, whose tanh of all gates already separates them, would only
            pay for the copy.
    """

    unroll: bool = False
    keeps: bool = True
    reads_ahead: bool = False


def transposes(kernel):
    """Whether the backward loop works with a transposed copy of the recurrent kernel.

    Args:
        kernel: Tensor of shape (U, G*U).
    """
    return kernel.shape[0] * kernel.shape[1] <= TRANSPOSED_AT_MOST
