"""Runs the forward loop."""

import typing

from keras import ops

from keras_bnrnn import backend
from keras_bnrnn.recurrence.schedule import Schedule


class Loop(typing.NamedTuple):
    """Describes a time loop, without the tensors that it differentiates.

    Attributes:
        step: Function of `(projected_t, recurrent_t, states, weights, valid_t)` that
            returns `(new_states, collected_t)`. It computes the new states from the
            input projection and the recurrent product, each (B, ...), and the list of
            states. `valid_t` is a boolean tensor (B, 1), or `None`.
        kernel: Function of the weights that returns the tensor (U, ...) by which the
            loop multiplies the output.
        valid: Boolean tensor (T, B, 1), true before the end of each row; `None` if all
            rows have T frames.
        step_reads_valid: Whether the step uses `valid_t`.
        bounded: Whether the states stay finite however long the loop runs on.
        collected: `(shape, dtype)` of each tensor in `collected_t`.
        schedule: `Schedule`.
    """

    step: typing.Callable
    kernel: typing.Callable
    valid: typing.Any = None
    step_reads_valid: bool = False
    bounded: bool = False
    collected: tuple = ()
    schedule: Schedule = Schedule()


def run(loop, projected, states, weights, stacks=1, keep=None, differentiable=True):
    """Runs the forward loop.

    Past the end of a row the loop continues from the last states of the row, and the
    caller drops the results. The states of cells with unbounded activations could
    overflow there, and gradients of 0 would become NaN. For such cells the states are
    set to 0 before each timestep past the end.

    Args:
        loop: `Loop`.
        projected: Tensor (T, B, G*U), the input projection.
        states: List of tensors (B, U); the first one is the output.
        weights: `Weights`. The bias is added to the projection.
        stacks: The number of states, the output first, that are stacked over time.
            Default: 1.
        keep: `(function, width)`: a function of `(projected_t, recurrent_t, weights)`
            whose result (B, width) is stacked too. Default: `None`.
        differentiable: Whether the backend can differentiate the loop. Default: `True`.

    Returns:
        `(sequences, last, kept, collected)`: the list of stacked states (T, B, U), the
        list of last states (B, U), the stacked result of `keep` or `None`, and the list
        of stacked `collected_t`.
    """
    kernel = loop.kernel(weights)
    clears = loop.valid is not None and not loop.bounded
    reads_valid = loop.valid is not None and (loop.step_reads_valid or clears)
    if clears:
        # An activation may be singular at 0, so the step reads the row's first frame
        # there.
        projected = ops.where(loop.valid, projected, projected[:1])
    specs = [(state.shape, state.dtype) for state in states[:stacks]]
    if keep is not None:
        specs.append(((*projected.shape[1:-1], keep[1]), projected.dtype))
    specs.extend(loop.collected)

    def body(states, elements):
        projected_t, valid_t = [*elements, None][:2]
        if clears:
            states = [ops.where(valid_t, s, ops.zeros_like(s)) for s in states]
        if weights.bias is not None:
            projected_t = projected_t + weights.bias
        recurrent_t = ops.matmul(weights.dropped(states[0]), kernel)
        new, collected_t = loop.step(projected_t, recurrent_t, states, weights, valid_t)
        stacked = list(new[:stacks])
        if keep is not None:
            stacked.append(keep[0](projected_t, recurrent_t, weights))
        return new, [*stacked, *collected_t]

    schedule = loop.schedule
    last, stacked = backend.scan(
        body,
        states,
        [projected, loop.valid] if reads_valid else [projected],
        specs,
        timesteps(projected),
        unroll=schedule.unroll,
        differentiable=differentiable,
        ahead=schedule.reads_ahead and not differentiable and keep is None,
    )
    sequences, stacked = stacked[:stacks], stacked[stacks:]
    kept = stacked.pop(0) if keep is not None else None
    return sequences, last, kept, stacked


def timesteps(sequence):
    """Returns T, an int if it is static."""
    return ops.shape(sequence)[0]
