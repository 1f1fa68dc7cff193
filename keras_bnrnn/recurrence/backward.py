"""Runs the backward loop.

The loop contains only the recurrent product and the operations that depend on it. The
factors of a `StepDerivative` do not depend on the incoming gradient. They are computed
before the loop, for all timesteps at once; or inside it, if the forward loop kept its
values by timestep. The gradients of the weights are products of many timesteps: of all,
after the loop, or of a block of timesteps whose gradients are still in the cache.
"""

import keras
from keras import ops

from keras_bnrnn import backend
from keras_bnrnn.recurrence.derivative import Parts, joined
from keras_bnrnn.recurrence.kept import specs_of_states, specs_of_values
from keras_bnrnn.recurrence.schedule import timesteps_of_block


def run(loop, derivative, inputs, states, weights, kept, d_sequences, d_last):
    """Computes the gradients of a forward loop.

    Past the end of a row the incoming gradients are 0 and all factors are finite, so no
    gradient passes.

    Args:
        loop: `Loop`.
        derivative: The `StepDerivative` of its step.
        inputs, states, weights: The arguments of the forward loop.
        kept: `Kept`.
        d_sequences: List of the gradients of the first sequences of states.
        d_last: List of the gradients of all last states.

    Returns:
        The gradient of `inputs`, the list of the gradients of `states`, and the dict
        of the gradients of `weights.in_loop()`.
    """
    run_loop = _by_step if kept.by_step else _at_once
    return run_loop(
        loop, derivative, inputs, states, weights, kept, d_sequences, d_last
    )


def _of_weights(derivative, weights, inputs, d_projected, d_recurrent, before, after):
    """Returns the dict of the gradients of `weights.in_loop()`, from some timesteps.

    The gradients of projection and recurrent product are lists of columns.
    """
    d_weights = derivative.of_weights(d_recurrent, before, after, weights)
    output = _flat(weights.dropped(before[0]))
    d_weights["recurrent_kernel"] = joined(
        [backend.transposed_times(output, _flat(part)) for part in d_recurrent]
    )
    if weights.kernel is not None:
        frames = _flat(inputs)
        d_weights["kernel"] = joined(
            [backend.transposed_times(frames, _flat(part)) for part in d_projected]
        )
    if weights.bias is not None:
        d_weights["bias"] = joined([backend.column_sums(d) for d in d_projected])
    return d_weights


def _at_once(loop, derivative, inputs, states, weights, kept, d_sequences, d_last):
    """Computes all factors before the loop. The rest is as in `run`."""
    after = kept.states
    before = [
        ops.concatenate([first[None], sequence[:-1]], axis=0)
        for first, sequence in zip(states, after, strict=True)
    ]
    factors = derivative.factors(kept.values, before, after, weights)
    through = _through(weights, weights.recurrent_kernel)

    def body(gradients, elements):
        of_step, incoming = elements[: len(factors)], elements[len(factors) :]
        gradients = _added(gradients, incoming)
        gradient, others = derivative.pull_back(gradients, of_step)
        d_states = through(derivative.of_recurrent(gradient), gradients, others)
        return d_states, [gradient]

    batch, units = states[0].shape
    d_states, (gradient,) = backend.scan(
        body,
        d_last,
        [*factors, *d_sequences],
        [((batch, derivative.width(units)), states[0].dtype)],
        ops.shape(inputs)[0],
        unroll=loop.schedule.unroll,
        reverse=True,
        turns=loop.turns,
        turn_length=loop.schedule.turn_length,
    )
    d_projected, d_recurrent = (
        derivative.of_projected(gradient),
        derivative.of_recurrent(gradient),
    )
    d_weights = _of_weights(
        derivative, weights, inputs, [d_projected], [d_recurrent], before, after
    )
    return d_projected, d_states, d_weights


def _by_step(loop, derivative, inputs, states, weights, kept, d_sequences, d_last):
    """Computes the factors inside the loop, where they stay in the cache.

    The arguments are those of `run`, and so are the returned values.
    """
    values = [
        backend.unstacked(*pair)
        for pair in zip(
            kept.values, specs_of_values(derivative, states, kept.joined), strict=True
        )
    ]
    before = [
        backend.unstacked(*pair)
        for pair in zip(kept.states, specs_of_states(states), strict=True)
    ]
    n, m = len(values), len(states)
    units, width = weights.recurrent_kernel.shape
    parts = whole = derivative.parts(units, width)
    # XLA writes the gradient of the projection over one tensor that the loop kept.
    # Without oneDNN a product of each part costs more than to concatenate them.
    in_parts = backend.in_plain_graph() and backend.products_by_onednn()
    if not in_parts:
        same = parts.projected == parts.recurrent
        parts = Parts([width] if same else [width] * 2, (0,), (0,) if same else (1,))
    through = _through(
        weights,
        derivative.arranged(weights.recurrent_kernel),
        [parts.widths[i] for i in parts.recurrent],
    )
    names = list(weights.in_loop())
    widths = derivative.widths(units)[: kept.joined]

    def body(carry, elements):
        values_t, before_t = elements[:n], elements[n : n + m]
        if kept.joined > 1:
            values_t = [*backend.split(values_t[0], widths, -1), *values_t[1:]]
        gradients = _added(carry[:m], elements[n + m :])
        found, others = derivative.step_back(
            gradients, values_t, before_t, carry[m:], weights
        )
        if not in_parts:
            sides = [whole.projected, whole.recurrent][: len(parts.widths)]
            found = [joined([found[i] for i in side]) for side in sides]
        d_states = through([found[i] for i in parts.recurrent], gradients, others)
        return [*d_states, *before_t], found

    def of_block(carry, gradients, start, end):
        before_s = [
            backend.between(sequence, start, end, states[0]) for sequence in before
        ]
        after_s = [
            ops.concatenate([sequence[1:], last[None]], axis=0)
            for sequence, last in zip(before_s, carry[m:], strict=True)
        ]
        found = _of_weights(
            derivative,
            weights,
            inputs[start:end],
            [gradients[i] for i in parts.projected],
            [gradients[i] for i in parts.recurrent],
            before_s,
            after_s,
        )
        return [found[name] for name in names]

    if weights.kernel is not None:
        transposed_kernels = _rows(
            ops.transpose(derivative.arranged(weights.kernel)),
            [parts.widths[i] for i in parts.projected],
        )

    def of_inputs(d_projected):
        if weights.kernel is None:
            return derivative.arranged(joined(d_projected))
        product = _product(map(_flat, d_projected), transposed_kernels)
        return ops.reshape(product, (*ops.shape(d_projected[0])[:2], inputs.shape[-1]))

    timesteps, rows = ops.shape(inputs)[:2]
    batch, dtype = states[0].shape[0], states[0].dtype
    carry, d_inputs, sums = backend.scan_blocks(
        body,
        [*d_last, *kept.last],
        [*values, *before, *d_sequences],
        [((batch, n), dtype) for n in parts.widths],
        timesteps,
        timesteps_of_block(rows),
        [_zero_sum(weight) for weight in weights.in_loop().values()],
        of_block,
        parts.projected,
        of_inputs,
        inputs.shape[-1],
        turns=loop.turns,
        in_place=0 if kept.joined else None,
        turn_length=loop.schedule.turn_length,
    )
    d_weights = {
        name: ops.cast(total, weight.dtype)
        for (name, weight), total in zip(weights.in_loop().items(), sums, strict=True)
    }
    for name in {"kernel", "recurrent_kernel", "bias"} & d_weights.keys():
        d_weights[name] = derivative.arranged(d_weights[name])
    return d_inputs, carry[:m], d_weights


def _zero_sum(weight):
    """Returns the zeros from which the gradient of a weight is summed over blocks.

    They are float32 for a weight in half precision: a sum of the terms of hundreds of
    blocks in bfloat16 would stop growing.
    """
    dtype = keras.backend.result_type(weight.dtype, "float32")
    return ops.zeros_like(weight, dtype=dtype)


def _added(gradients, incoming):
    """Adds the incoming gradients to those of the first states."""
    rest = gradients[len(incoming) :]
    return [g + d for g, d in zip(gradients, incoming, strict=False)] + rest


def _through(weights, kernel, widths=None):
    """Returns the function that backpropagates through one recurrent product.

    Args:
        weights: `Weights`.
        kernel: Tensor (U, G*U).
        widths: List of the widths of the parts in which the function gets the gradient
            of the product. `None` (default): it gets one tensor.
    """
    transposed = ops.transpose(kernel)
    if widths is not None:
        transposed = _rows(transposed, widths)

    def through(d_recurrent, gradients, others):
        """Returns the gradients of the states before the step, with none `None`."""
        if widths is None:
            d_output = ops.matmul(d_recurrent, transposed)
        else:
            d_output = _product(d_recurrent, transposed)
        d_output = weights.dropped(d_output)
        first, *rest = others
        return [d_output if first is None else first + d_output] + [
            ops.zeros_like(d) if other is None else other
            for d, other in zip(gradients[1:], rest, strict=True)
        ]

    return through


def _product(parts, kernels):
    """Computes the sum of the products of several matrices with as many kernels."""
    products = [ops.matmul(*pair) for pair in zip(parts, kernels, strict=True)]
    return products[0] if len(products) == 1 else backend.add_n(products)


def _rows(kernel, heights):
    """Splits a kernel into parts of given numbers of rows."""
    return [kernel] if len(heights) == 1 else backend.split(kernel, heights, 0)


def _flat(sequence):
    """Reshapes (T, B, F) to (T*B, F)."""
    return ops.reshape(sequence, (-1, sequence.shape[-1]))
