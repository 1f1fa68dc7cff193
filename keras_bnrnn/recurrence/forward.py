"""Runs the forward loop."""

import functools
import typing

from keras import ops

from keras_bnrnn import backend
from keras_bnrnn.recurrence.kept import (
    Kept,
    joined_values,
    specs_of_states,
    specs_of_values,
)
from keras_bnrnn.recurrence.schedule import Schedule, timesteps_of_block


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
        turns: The number of turns, T or 0 (an int or a tensor): 0 for a loop without
            rows. `None`: T.
        alone: Whether no other slice of the batch runs at the same time, a boolean or a
            tensor. Default: `True`.
        schedule: `Schedule`.
    """

    step: typing.Callable
    kernel: typing.Callable
    valid: typing.Any = None
    step_reads_valid: bool = False
    bounded: bool = False
    collected: tuple = ()
    turns: typing.Any = None
    alone: typing.Any = True
    schedule: Schedule = Schedule()


def projected(inputs, weights):
    """Computes the input projection.

    Args:
        inputs, weights: As in `time_loop`.

    Returns:
        The projection (T, B, G*U), and the weights without what it contains.
    """
    if weights.kernel is None:
        return inputs, weights
    # In a plain graph product and bias are one operation. Elsewhere the loop adds the
    # bias.
    bias = weights.bias if backend.in_plain_graph() else None
    product = _product(inputs, weights.kernel, bias)
    if bias is not None:
        weights = weights._replace(bias=None)
    return product, weights._replace(kernel=None)


def projects_itself(loop, weights, derivative):
    """Returns whether `run` projects the input of a loop, rather than its caller.

    In training it projects in blocks. At inference each slice of a batch of unknown
    size has a projection of its own, and so has each gate of a loop by gate.

    Args:
        loop: `Loop`.
        weights: `Weights`, with a kernel if the input is not projected yet.
        derivative: `StepDerivative`.
    """
    schedule = loop.schedule
    is_whole = schedule.sliced_from is None and derivative.gates == 1
    return (
        weights.kernel is not None
        and schedule.by_step
        and (schedule.keeps or not is_whole)
        and not _clears(loop)  # which reads timestep 0 in place of others
        and backend.in_plain_graph()
    )


def _product(frames, kernel, bias):
    """Computes `frames . kernel + bias` of frames (n, B, D)."""
    shape = (*ops.shape(frames)[:-1], kernel.shape[-1])
    frames = ops.reshape(frames, (-1, frames.shape[-1]))
    if bias is None:
        return ops.reshape(ops.matmul(frames, kernel), shape)
    return ops.reshape(backend.product_and_bias(frames, kernel, bias), shape)


def run(loop, inputs, states, weights, stacks=1, derivative=None, keeps=False):
    """Runs the forward loop.

    Past the end of a row the loop continues from the last states of the row, and the
    caller drops the results. The states of cells with unbounded activations could
    overflow there, and gradients of 0 would become NaN. For such cells the states are
    set to 0 before each timestep past the end.

    Args:
        loop: `Loop`.
        inputs: Tensor (T, B, G*U), the input projection. Or, if `weights` has a kernel,
            tensor (T, B, D): the loop then projects one block of timesteps at a time,
            or all at once if it computes gates side by side and keeps nothing. This
            needs `projects_itself`.
        states: List of tensors (B, U); the first one is the output.
        weights: `Weights`. The bias is added to the projection.
        stacks: The number of states, the output first, that are stacked over time.
            Default: 1.
        derivative: `StepDerivative`. The backend can then not differentiate the loop.
            Default: `None`.
        keeps: Whether the loop keeps what `derivative` needs. Default: `False`.

    Returns:
        `(sequences, last, kept, collected)`: the list of stacked states (T, B, U), the
        list of last states (B, U), `Kept` or `None`, and the list of stacked
        `collected_t`.
    """
    schedule = loop.schedule
    kernel = loop.kernel(weights)
    clears = _clears(loop)
    reads_valid = loop.valid is not None and (loop.step_reads_valid or clears)
    if clears:
        # An activation may be singular at 0, so the step reads the row's first frame
        # there.
        inputs = ops.where(loop.valid, inputs, inputs[:1])
    timesteps, rows = ops.shape(inputs)[:2]
    gates = 1 if derivative is None else derivative.gates
    products = 1 if derivative is None else derivative.products
    kernels = _columns(kernel, products)
    prepare = None
    if weights.kernel is not None:
        pairs = zip(
            _columns(weights.kernel, gates), _columns(weights.bias, gates), strict=True
        )
        prepare = functools.partial(_products, pairs=list(pairs))
        weights = weights._replace(kernel=None, bias=None)
    biases = _columns(weights.bias, gates)
    if prepare is not None and gates > 1 and not keeps:
        sequences, prepare = prepare(inputs), None
    elif prepare is None and gates > 1:
        sequences = _by_gate(inputs, gates)
    else:
        sequences = [inputs]
    count = stacks
    if keeps and not schedule.by_step:
        count = len(states)
    specs = specs_of_states(states)[:count] + list(loop.collected)
    joined = 0
    if keeps:
        if schedule.by_step:
            units, width = weights.recurrent_kernel.shape
            joined = joined_values(derivative, units, width)
        specs_of_kept = specs_of_values(derivative, states, joined)
        specs += specs_of_kept
        if schedule.by_step:
            specs += specs_of_states(states)

    def body(states, elements):
        projected, valid_t = elements[: len(elements) - reads_valid], None
        if reads_valid:
            valid_t = elements[-1]
        # Kept uncleared: the backward loop also reads them as the states after the
        # previous step.
        before = states if schedule.by_step else []
        if clears:
            states = [ops.where(valid_t, s, ops.zeros_like(s)) for s in states]
        if weights.bias is not None:
            projected = [x + bias for x, bias in zip(projected, biases, strict=True)]
        output = weights.dropped(states[0])
        recurrent = [ops.matmul(output, columns) for columns in kernels]
        if gates == 1:
            (projected,) = projected
        if products == 1:
            (recurrent,) = recurrent
        if not keeps and gates == 1:
            new, collected = loop.step(projected, recurrent, states, weights, valid_t)
            return new, [*new[:count], *collected]
        values = derivative.keep(projected, recurrent, states, weights)
        new = derivative.advance(values, states, weights)
        if not keeps:
            return new, new[:count]
        if joined:
            values = [ops.concatenate(values[:joined], axis=-1), *values[joined:]]
        return new, [*new[:count], *values, *before]

    last, results = backend.scan(
        body,
        states,
        [*sequences, loop.valid] if reads_valid else sequences,
        specs,
        timesteps,
        unroll=schedule.unroll,
        differentiable=derivative is None,
        ahead=schedule.reads_ahead and derivative is not None and not keeps,
        stacks=count if keeps and schedule.by_step else None,
        turns=loop.turns,
        prepare=prepare,
        block=timesteps_of_block(rows),
        in_place=count if joined else None,
        turn_length=schedule.turn_length,
    )
    sequences, rest = results[:count], results[count:]
    if not keeps:
        return sequences, last, None, rest
    n = len(specs_of_kept)
    kept = Kept(
        rest[:n],
        rest[n:] if schedule.by_step else sequences,
        last,
        schedule.by_step,
        joined,
    )
    return sequences[:stacks], last, kept, []


def _products(frames, pairs):
    """Computes the `_product` of frames with each pair of a kernel and a bias."""
    return [_product(frames, *pair) for pair in pairs]


def _by_gate(projected, gates):
    """Splits a projection (T, B, G*U) into the list of those of its gates.

    The backend reads a timestep of the transposed projection without a copy.
    """
    units = projected.shape[-1] // gates
    shape = (*ops.shape(projected)[:2], gates, units)
    return ops.unstack(
        ops.transpose(ops.reshape(projected, shape), (2, 0, 1, 3)), gates
    )


def _columns(x, count):
    """Splits the columns of a tensor in equal parts, or `None` into as many."""
    if x is None:
        return [None] * count
    return [x] if count == 1 else ops.split(x, count, axis=-1)


def _clears(loop):
    """Returns whether the loop sets states to 0 past the end of a row."""
    return loop.valid is not None and not loop.bounded
