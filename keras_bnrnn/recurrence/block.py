"""Runs a loop by the backend's operations for whole sequences, where it has them."""

from keras import ops

from keras_bnrnn import backend
from keras_bnrnn.recurrence import forward
from keras_bnrnn.recurrence.schedule import (
    is_faster_by_loop,
    runs_in_one_operation,
    timesteps_of_block,
)


def runs_as_block(loop, rows, weights, derivative):
    """Returns whether `Block` does what the time loop would do in training.

    Args:
        loop: `Loop`.
        rows: The number of rows of the batch, an int or a tensor.
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
        and not is_faster_by_loop(
            rows, weights.kernel, weights.recurrent_kernel, loop.schedule.has_company
        )
    )


class Block:
    """Runs LSTMs with the usual activations.

    Args:
        stacks: The number of stacked states that are returned.
        wants_last: Whether last states are returned.
        traced: Function of a function that returns what to call in its place.
    """

    def __init__(self, stacks, wants_last, traced):
        self._stacks = stacks
        self._wants_last = wants_last
        self._forward = traced(self._forward)
        self._backward = traced(self._backward)

    def __call__(self, loop, frames, states, weights):
        """Returns the list of stacked states (T, B, U) and that of last states (B, U).

        Args:
            loop: `Loop`.
            frames: Tensor (T, B, D).
            states: List of h and c, (B, U).
            weights: `Weights`.
        """
        has_bias = weights.bias is not None

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
            found = forward.run(loop, projected, states, own, self._stacks)
            return self._flat(*found[:2])

        def run(*arguments):
            return self._forward(loop, *named(arguments))

        def gradient(arguments, kept, upstream):
            *tensors, _ = named(arguments)
            found = self._backward(loop, *tensors, list(kept), list(upstream))
            return found if has_bias else found[:-1]

        arguments = [frames, *states, weights.kernel, weights.recurrent_kernel]
        if has_bias:
            arguments.append(weights.bias)
        found = list(backend.custom_gradient(plain, run, gradient)(*arguments))
        return found[: self._stacks], found[self._stacks :]

    def _flat(self, sequences, last):
        return [*sequences, *(last if self._wants_last else [])]

    def _forward(self, loop, frames, states, kernel, recurrent_kernel, bias):
        sequences, last, kept = backend.block_forward(
            frames,
            states,
            kernel,
            recurrent_kernel,
            bias,
            self._stacks,
            *_blocks(loop, frames, kernel, recurrent_kernel),
        )
        return self._flat(sequences, last), kept

    def _backward(self, loop, frames, states, kernel, recurrent_kernel, kept, upstream):
        d_sequences, d_last = upstream[: self._stacks], upstream[self._stacks :]
        if not self._wants_last:
            d_last = [ops.zeros_like(state) for state in states]
        return backend.block_backward(
            frames,
            states,
            kernel,
            recurrent_kernel,
            kept,
            d_sequences,
            d_last,
            *_blocks(loop, frames, kernel, recurrent_kernel),
        )


def _blocks(loop, frames, kernel, recurrent_kernel):
    """Returns the last arguments of the backend's functions, the same for both."""
    rows = ops.shape(frames)[1]
    is_small = runs_in_one_operation(rows, loop.alone, kernel, recurrent_kernel)
    return timesteps_of_block(rows), is_small, loop.turns
