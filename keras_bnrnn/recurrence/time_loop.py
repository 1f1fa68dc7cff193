"""Runs the time loop that all cells share.

A cell provides an elementwise step, and optionally the derivative of the step. The loop
computes the recurrent product, the states, the results stacked over time, and the
gradient. Tensors over time have the shape (T, B, ...), in the order of processing.
"""

from keras import ops

from keras_bnrnn import backend
from keras_bnrnn.frames import at_end
from keras_bnrnn.recurrence import backward, forward
from keras_bnrnn.recurrence.forward import Loop

__all__ = ["Loop", "time_loop"]


def time_loop(
    loop,
    projected,
    states,
    weights,
    lengths=None,
    return_sequences=True,
    wants_states=True,
    derivative=None,
):
    """Runs a cell's step over the timesteps of a projected sequence.

    Args:
        loop: `Loop`: the step, and how to run it.
        projected: Tensor of shape (T, B, G*U), the input projection.
        states: List of tensors of shape (B, U); the first one is the output.
        weights: `Weights` of the recurrence.
        lengths: int32 tensor (B,), the number of valid frames of each row. `None`
            (default): all rows have T frames.
        return_sequences: Whether outputs are returned. Default: `True`.
        wants_states: Whether all last states are used. Otherwise only the first of the
            returned states is correct. Default: `True`.
        derivative: `StepDerivative` of the step. The step must then collect nothing.
            `None` (default): the backend differentiates the loop.

    Returns:
        `(outputs, states, collected)`. `outputs` has the shape (T, B, U) and is finite
        but unspecified past the end of a row. It is `None` without `return_sequences`.
        `states` is the list of the states (B, U) at the end of each row. `collected` is
        the list of collected tensors (T, ...).
    """
    # The states at the end of a row are read from the states stacked over time.
    stacks = int(return_sequences)
    if lengths is not None:
        stacks = len(states) if wants_states else 1
    if derivative is None:
        sequences, last, _, collected = forward.run(
            loop, projected, states, weights, stacks
        )
    else:
        collected = []
        sequences, last = _differentiated(
            loop, derivative, projected, states, weights, stacks, lengths is None
        )
    if lengths is not None:
        last = [at_end(*pair, lengths) for pair in zip(sequences, states, strict=False)]
        last += states[stacks:]
    return sequences[0] if return_sequences else None, last, collected


def _differentiated(loop, derivative, projected, states, weights, stacks, wants_last):
    """Runs a loop whose gradient is that of `derivative`.

    Args:
        loop, derivative, projected, states, weights: As in `time_loop`.
        stacks: The number of stacked states.
        wants_last: Whether last states are returned.

    Returns:
        The list of stacked states (T, B, U) and the list of last states (B, U).
    """
    in_loop = weights.in_loop()
    count = len(states)
    keep = derivative.pre_activations, derivative.width(states[0].shape[-1])

    def named(arguments):
        projected, *rest = arguments
        tensors = dict(zip(in_loop, rest[count:], strict=True))
        return projected, rest[:count], weights.replaced(tensors)

    def flat(sequences, last):
        return [*sequences[:stacks], *(last if wants_last else [])]

    def plain(*arguments):
        """Runs the loop so that the backend can differentiate it repeatedly."""
        sequences, last, _, _ = forward.run(loop, *named(arguments), stacks)
        return flat(sequences, last)

    def keep_all(*arguments):
        sequences, last, kept, _ = forward.run(
            loop, *named(arguments), count, keep, differentiable=False
        )
        return flat(sequences, last), [kept, *sequences]

    def keep_nothing(*arguments):
        sequences, last, _, _ = forward.run(
            loop, *named(arguments), stacks, differentiable=False
        )
        return flat(sequences, last), []

    keeps = loop.schedule.keeps

    def gradient(arguments, kept, upstream):
        if not keeps:
            _, kept = keep_all(*arguments)
        d_sequences, d_last = list(upstream[:stacks]), list(upstream[stacks:])
        if not wants_last:
            d_last = [ops.zeros_like(state) for state in states]
        d_projected, d_states, d_weights = backward.run(
            loop,
            derivative,
            *named(arguments),
            (kept[0], kept[1:]),
            d_sequences,
            d_last,
        )
        return [d_projected, *d_states, *(d_weights[name] for name in in_loop)]

    run = backend.custom_gradient(plain, keep_all if keeps else keep_nothing, gradient)
    results = list(run(projected, *states, *in_loop.values()))
    return results[:stacks], results[stacks:]
