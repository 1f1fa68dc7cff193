"""Holds what the forward loop keeps for the backward loop."""

import typing


class Kept(typing.NamedTuple):
    """What the forward loop kept for the backward loop.

    Attributes:
        values: List of tensors, what `StepDerivative.keep` returned at each timestep.
        states: List of tensors: if `by_step`, the states before each step, otherwise
            the states after it.
        last: List of tensors (B, U), the states after the last step.
        by_step: Whether `values` and `states` were left unstacked where the backend can
            do so.
    """

    values: list
    states: list
    last: list
    by_step: bool

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


def specs_of_values(derivative, states):
    """Lists shape and dtype of the values that `derivative.keep` returns."""
    batch, units = states[0].shape
    return [((batch, width), states[0].dtype) for width in derivative.widths(units)]
