"""Runs a loop by the backend's operations for whole sequences, where it has them."""

from keras import ops

from keras_bnrnn import backend
from keras_bnrnn.recurrence import forward
from keras_bnrnn.recurrence.schedule import runs_in_one_operation, timesteps_of_block


def runs_as_block(loop, weights, derivative):
    """Returns whether `run` can do what the time loop would do in training.

    Args:
        loop: `Loop`.
        weights: `Weights`, with a kernel if the input is not projected yet.
        derivative: `StepDerivative`, or `None`.
    """
    return (
        loop.schedule.by_step
        and loop.schedule.keeps
        and loop.bounded
        and weights.kernel is not None
        and weights.recurrent_dropout_mask is None
        and derivative is not None
        and backend.has_block(derivative.block_of(weights))
    )


def run(loop, frames, states, weights, stacks, wants_last):
    """Runs an LSTM with the usual activations.

    Args:
        loop: `Loop`.
        frames: Tensor (T, B, D).
        states: List of h and c, (B, U).
        weights: `Weights`.
        stacks: The number of stacked states that are returned.
        wants_last: Whether last states are returned.

    Returns:
        The list of stacked states (T, B, U) and the list of last states (B, U).
    """
    has_bias = weights.bias is not None
    rows = ops.shape(frames)[1]
    is_small = runs_in_one_operation(
        rows, loop.alone, weights.kernel, weights.recurrent_kernel
    )
    blocks = timesteps_of_block(rows), is_small, loop.turns

    def named(arguments):
        frames, h, c, kernel, recurrent_kernel, *bias = arguments
        return frames, [h, c], kernel, recurrent_kernel, bias[0] if bias else None

    def plain(*arguments):
        """Runs the loop so that the backend can differentiate it repeatedly."""
        frames, states, kernel, recurrent_kernel, bias = named(arguments)
        own = weights._replace(
            kernel=kernel, recurrent_kernel=recurrent_kernel, bias=bias
        )
        projected, own = forward.projected(frames, own)
        sequences, last, _, _ = forward.run(loop, projected, states, own, stacks)
        return [*sequences, *(last if wants_last else [])]

    def keep_all(*arguments):
        sequences, last, kept = backend.block_forward(
            *named(arguments), stacks, *blocks
        )
        return [*sequences, *(last if wants_last else [])], kept

    def gradient(arguments, kept, upstream):
        frames, states, kernel, recurrent_kernel, _ = named(arguments)
        d_last = list(upstream[stacks:])
        if not wants_last:
            d_last = [ops.zeros_like(state) for state in states]
        gradients = backend.block_backward(
            frames,
            states,
            kernel,
            recurrent_kernel,
            list(kept),
            list(upstream[:stacks]),
            d_last,
            *blocks,
        )
        return gradients if has_bias else gradients[:-1]

    arguments = [frames, *states, weights.kernel, weights.recurrent_kernel]
    if has_bias:
        arguments.append(weights.bias)
    found = list(backend.custom_gradient(plain, keep_all, gradient)(*arguments))
    return found[:stacks], found[stacks:]
