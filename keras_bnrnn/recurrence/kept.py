"""Holds what the forward loop keeps for the backward loop."""

import typing

from keras_bnrnn import backend


class Kept(typing.NamedTuple):
    """What the forward loop kept for the backward loop.

    Attributes:
        values: List of tensors, what `StepDerivative.keep` returned at each timestep.
        states: List of tensors: if `by_step`, the states before each step, otherwise
            the states after it.
        last: List of tensors (B, U), the states after the last step.
        by_step: Whether `values` and `states` were left unstacked where the backend can
            do so.
        joined: The number of values that are parts of the first tensor, as of
            `joined_values`. Default: 0.
    """

    values: list
    states: list
    last: list
    by_step: bool
    joined: int = 0

    def tensors(self):
        return [*self.values, *self.states, *self.last]

    def replaced(self, tensors):
        """Returns this with other tensors, in the order of `tensors`."""
        n, m = len(self.values), len(self.states)
        return self._replace(
            values=tensors[:n], states=tensors[n : n + m], last=tensors[n + m :]
        )


def specs_of_states(states):
    """Lists shape and dtype of states."""
    return [(state.shape, state.dtype) for state in states]


def specs_of_values(derivative, states, joined=0):
    """Lists shape and dtype of the values that the forward loop keeps.

    Args:
        derivative: `StepDerivative`.
        states: List of tensors (B, U).
        joined: As `joined_values` returns it. Default: 0.
    """
    batch, units = states[0].shape
    widths = derivative.widths(units)
    if joined:
        widths = [sum(widths[:joined]), *widths[joined:]]
    return [((batch, width), states[0].dtype) for width in widths]


def joined_values(derivative, units, width):
    """Returns how many values XLA's loops keep as one tensor.

    This tensor has the width of the input projection. The forward loop writes it over
    the projection, and the backward loop writes the gradient of the projection over it.

    Args:
        derivative: `StepDerivative`.
        units: U.
        width: G*U, the width of the projection.

    Returns:
        The number of values, from the first one on. 0: no such tensor.
    """
    if backend.compiled_by_xla():
        widths = derivative.widths(units)
        for count in range(1, len(widths) + 1):
            if sum(widths[:count]) == width:
                return count
    return 0
