"""Runs the backward loop.

The loop contains only the recurrent product and the operations that depend on it. The
factors of a `StepDerivative` do not depend on the incoming gradient: they are computed
before the loop, for all timesteps at once. The gradient of the recurrent kernel is one
product after the loop.
"""

from keras import ops

from keras_bnrnn import backend
from keras_bnrnn.recurrence import schedule as schedules


def run(loop, derivative, projected, states, weights, kept, d_sequences, d_last):
    """Computes the gradients of a forward loop.

    Past the end of a row the incoming gradients are 0 and all factors are finite, so no
    gradient passes.

    Args:
        loop: `Loop`.
        derivative: The `StepDerivative` of its step.
        projected, states, weights: The arguments of the forward loop.
        kept: `(pre_activations, sequences)`: the stacked pre-activations (T, B, P) and
            the list of all stacked states (T, B, U).
        d_sequences: List of the gradients of the first sequences of states.
        d_last: List of the gradients of all last states.

    Returns:
        The gradient of `projected`, the list of the gradients of `states`, and the dict
        of the gradients of `weights.in_loop()`.
    """
    pre_activations, after = kept
    before = [
        ops.concatenate([first[None], sequence[:-1]], axis=0)
        for first, sequence in zip(states, after, strict=True)
    ]
    factors = derivative.factors(pre_activations, before, after, weights)
    times_kernel_transposed = _times_transposed(weights.recurrent_kernel)

    def body(gradients, elements):
        of_step = elements[: len(factors)]
        for i, d in enumerate(elements[len(factors) :]):
            gradients[i] = gradients[i] + d
        gradient, others = derivative.pull_back(gradients, of_step)
        d_recurrent = derivative.of_recurrent(gradient)
        through = weights.dropped(times_kernel_transposed(d_recurrent))
        others[0] = through if others[0] is None else others[0] + through
        return [
            ops.zeros_like(d) if other is None else other
            for d, other in zip(gradients, others, strict=True)
        ], [gradient]

    d_states, (gradient,) = backend.scan(
        body,
        d_last,
        [*factors, *d_sequences],
        [(pre_activations.shape[1:], pre_activations.dtype)],
        ops.shape(projected)[0],
        unroll=loop.schedule.unroll,
        reverse=True,
    )

    d_projected = derivative.of_projected(gradient)
    d_weights = derivative.of_weights(gradient, before, after, weights)
    d_weights["recurrent_kernel"] = backend.transposed_times(
        _flat(weights.dropped(before[0])), _flat(derivative.of_recurrent(gradient))
    )
    if weights.bias is not None:
        d_weights["bias"] = ops.sum(d_projected, axis=(0, 1))
    return d_projected, d_states, d_weights


def _times_transposed(kernel):
    """Returns a function that computes x . kernel' for a tensor x."""
    if schedules.transposes(kernel):
        transposed = ops.transpose(kernel)
        return lambda x: ops.matmul(x, transposed)
    return lambda x: backend.times_transposed(x, kernel)


def _flat(sequence):
    """Reshapes (T, B, F) to (T*B, F)."""
    return ops.reshape(sequence, (-1, sequence.shape[-1]))
