"""Runs the time loop that all cells share.

A cell provides an elementwise step, and optionally the derivative of the step. The loop
computes the recurrent product, the states, the results stacked over time, and the
gradient. Tensors over time have the shape (T, B, ...), in the order of processing.
"""

from keras import ops

from keras_bnrnn import backend
from keras_bnrnn.frames import at_end
from keras_bnrnn.recurrence import backward, block, forward
from keras_bnrnn.recurrence.forward import Loop
from keras_bnrnn.recurrence.schedule import (
    most_rows_by_gate,
    runs_by_gate,
    slices_of,
)

__all__ = ["Loop", "time_loop"]


def time_loop(
    loop,
    inputs,
    states,
    weights,
    lengths=None,
    return_sequences=True,
    wants_states=True,
    derivative=None,
):
    """Runs a cell's step over the timesteps of a sequence.

    In a graph on CPUs, slices of a large batch run side by side, as loops of their own.

    Args:
        loop: `Loop`: the step, and how to run it.
        inputs: Tensor of shape (T, B, D), which is multiplied by `weights.kernel`. If
            that is `None`: tensor of shape (T, B, G*U), the input projection.
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
    timesteps, batch = ops.shape(inputs)[:2]
    units = states[0].shape[-1]
    loop = loop._replace(schedule=loop.schedule.settled(timesteps, batch, units))

    sizes = [batch]
    is_block = block.runs_as_block(loop, batch, weights, derivative)
    if derivative is not None and loop.schedule.by_step and not is_block:
        derivative = _fastest(derivative, loop.schedule, batch, weights)
    if derivative is not None and derivative.products > 1:
        if not isinstance(batch, int) and not loop.schedule.keeps:
            least = most_rows_by_gate(loop.schedule) + 1
            loop = loop._replace(schedule=loop.schedule._replace(sliced_from=least))
    elif not (
        loop.collected
        or loop.schedule.unroll
        or (loop.schedule.has_company and not is_block)
    ):
        slices = slices_of(weights, is_block, loop.schedule.keeps)
        count = 4 if isinstance(batch, int) and batch in slices.four else 2
        sizes = backend.slice_sizes(batch, slices.two_from, count)
        if len(sizes) > 1 and not isinstance(batch, int) and not loop.schedule.keeps:
            # Converters of `keras.Model.export` support no slices that may be empty.
            sizes = [batch]
            schedule = loop.schedule._replace(sliced_from=slices.two_from)
            loop = loop._replace(schedule=schedule)
    run = _Run(return_sequences, wants_states, derivative, is_block, len(sizes) > 1)
    if len(sizes) == 1:
        return run(loop, inputs, states, weights, lengths)

    slices = _slices(sizes, loop, inputs, states, weights)
    results = [
        run(*slice_, lengths_s)
        for slice_, lengths_s in zip(slices, _split(lengths, sizes, 0), strict=True)
    ]
    outputs, last, _ = zip(*results, strict=True)
    if return_sequences:
        outputs = ops.concatenate(outputs, axis=1)
    return outputs if return_sequences else None, _joined(last, axis=0), []


def _fastest(derivative, schedule, rows, weights):
    """Chooses the `StepDerivative` of a loop that computes factors by step."""
    by_gate = derivative.by_gate(weights)
    if by_gate and runs_by_gate(schedule, rows, weights, by_gate.products):
        return by_gate
    by_operation = derivative.by_operation(weights) if schedule.keeps else None
    return by_operation or derivative


def _slices(sizes, loop, inputs, states, weights):
    """Cuts the arguments of a time loop in slices of the batch.

    Args:
        sizes: The number of rows of each slice, ints or tensors.
        loop, inputs, states, weights: As in `time_loop`.

    Returns:
        List of `(loop, inputs, states, weights)`, one for each slice.
    """
    tensors = {
        "valid": (loop.valid, 1),
        "inputs": (inputs, 1),
        "mask": (weights.recurrent_dropout_mask, 0),
        **{i: (state, 0) for i, state in enumerate(states)},
    }
    parts = {name: _split(x, sizes, axis) for name, (x, axis) in tensors.items()}
    slices = []
    for k, size in enumerate(sizes):
        turns, alone = None, False
        if loop.schedule.keeps and not isinstance(size, int):
            turns = ops.where(size > 0, ops.shape(inputs)[0], 0)
            alone = ops.equal(sizes[1], 0)
        slices.append(
            (
                loop._replace(valid=parts["valid"][k], turns=turns, alone=alone),
                parts["inputs"][k],
                [parts[i][k] for i in range(len(states))],
                weights._replace(recurrent_dropout_mask=parts["mask"][k]),
            )
        )
    return slices


def _split(x, sizes, axis):
    """Splits a tensor, or `None` into as many."""
    return [None] * len(sizes) if x is None else backend.split(x, sizes, axis)


def _joined(lists, axis):
    """Concatenates the tensors of equal place in several lists."""
    return [ops.concatenate(parts, axis) for parts in zip(*lists, strict=True)]


class _Run:
    """Does what `time_loop` does, in one loop. Calls share the functions they trace.

    Only what differentiates the loops is outside these functions: around a function,
    TensorFlow cannot differentiate a custom gradient again.

    Args:
        return_sequences, wants_states, derivative: As in `time_loop`.
        is_block: Whether operations for whole sequences run.
        traces_once: Whether there are several calls.
    """

    def __init__(
        self, return_sequences, wants_states, derivative, is_block, traces_once
    ):
        self._return_sequences = return_sequences
        self._wants_states = wants_states
        self._derivative = derivative
        self._is_block = is_block
        self._traced = backend.traced_once if traces_once else lambda function: function
        self._differentiable = None

    def __call__(self, loop, inputs, states, weights, lengths):
        # The states at the end of a row are read from the states stacked over time.
        stacks = int(self._return_sequences)
        if lengths is not None:
            stacks = len(states) if self._wants_states else 1
        derivative = self._derivative
        collected = []
        if derivative is None:
            inputs, weights = forward.projected(inputs, weights)
            sequences, last, _, collected = forward.run(
                loop, inputs, states, weights, stacks
            )
        else:
            if not self._is_block and not forward.projects_itself(
                loop, weights, derivative
            ):
                inputs, weights = forward.projected(inputs, weights)
            if self._differentiable is None:
                options = stacks, lengths is None, self._traced
                self._differentiable = (
                    block.Block(*options)
                    if self._is_block
                    else _Differentiated(derivative, *options)
                )
            sequences, last = self._differentiable(loop, inputs, states, weights)
        if lengths is not None:
            pairs = zip(sequences, states, strict=False)
            last = [at_end(*pair, lengths) for pair in pairs] + states[stacks:]
        return sequences[0] if self._return_sequences else None, last, collected


class _Differentiated:
    """Runs loops whose gradient is that of a `StepDerivative`.

    Args:
        derivative: As in `time_loop`.
        stacks: The number of stacked states.
        wants_last: Whether last states are returned.
        traced: Function of a function that returns what to call in its place.
    """

    def __init__(self, derivative, stacks, wants_last, traced):
        self._derivative = derivative
        self._stacks = stacks
        self._wants_last = wants_last
        self._kept_as = None
        self._keep_all = traced(self._keep_all)
        self._keep_nothing = traced(self._keep_nothing)
        self._gradient = traced(self._gradient)

    def __call__(self, loop, inputs, states, weights):
        """Returns the list of stacked states (T, B, U) and that of last states (B, U).

        Args:
            loop, inputs, states, weights: As in `time_loop`.
        """
        in_loop = weights.in_loop()
        keeps = loop.schedule.keeps

        def named(arguments):
            inputs, *rest = arguments
            n = len(states)
            tensors = dict(zip(in_loop, rest[n:], strict=True))
            return inputs, rest[:n], weights.replaced(tensors)

        def plain(*arguments):
            """Runs the loop so that the backend can differentiate it repeatedly."""
            inputs, states, weights = named(arguments)
            inputs, weights = forward.projected(inputs, weights)
            found = forward.run(loop, inputs, states, weights, self._stacks)
            return self._flat(*found[:2])

        def run(*arguments):
            if keeps:
                return self._keep_all(loop, *named(arguments))
            return self._keep_nothing(loop, *named(arguments)), []

        def gradient(arguments, kept, upstream):
            if not keeps:
                _, kept = self._keep_all(loop, *named(arguments))
            return self._gradient(loop, *named(arguments), list(kept), list(upstream))

        function = backend.custom_gradient(plain, run, gradient)
        results = list(function(inputs, *states, *in_loop.values()))
        return results[: self._stacks], results[self._stacks :]

    def _flat(self, sequences, last):
        return [*sequences, *(last if self._wants_last else [])]

    def _keep_all(self, loop, inputs, states, weights):
        sequences, last, self._kept_as, _ = forward.run(
            loop, inputs, states, weights, self._stacks, self._derivative, keeps=True
        )
        return self._flat(sequences, last), self._kept_as.tensors()

    def _keep_nothing(self, loop, inputs, states, weights, derivative=None):
        """Runs the loop, a large batch of unknown size in slices.

        It runs by `derivative`; if that is `None`, by the derivative of this object.
        """
        derivative = derivative or self._derivative
        least = loop.schedule.sliced_from
        if least is None:
            if derivative.gates == 1:
                inputs, weights = forward.projected(inputs, weights)
            found = forward.run(loop, inputs, states, weights, self._stacks, derivative)
            return self._flat(*found[:2])

        loop = loop._replace(schedule=loop.schedule._replace(sliced_from=None))
        tensors = loop, inputs, states, weights
        of_slices = derivative.of_slices()
        batch = ops.shape(inputs)[1]
        sizes = [batch - batch // 2, batch // 2]

        def in_slices():
            # Large batches gain least from long turns, which add to the first call.
            short = loop._replace(schedule=loop.schedule._replace(turn_length=1))
            slices = _slices(sizes, short, *tensors[1:])
            found = [self._keep_nothing(*slice_, of_slices) for slice_ in slices]
            return [
                *_joined([part[: self._stacks] for part in found], axis=1),
                *_joined([part[self._stacks :] for part in found], axis=0),
            ]

        return ops.cond(batch >= least, in_slices, lambda: self._keep_nothing(*tensors))

    def _gradient(self, loop, inputs, states, weights, kept, upstream):
        """Returns the gradients of the inputs, the states and `weights.in_loop()`."""
        d_sequences, d_last = upstream[: self._stacks], upstream[self._stacks :]
        if not self._wants_last:
            d_last = [ops.zeros_like(state) for state in states]
        d_inputs, d_states, d_weights = backward.run(
            loop,
            self._derivative,
            inputs,
            states,
            weights,
            self._kept_as.replaced(kept),
            d_sequences,
            d_last,
        )
        return [d_inputs, *d_states, *(d_weights[name] for name in weights.in_loop())]
