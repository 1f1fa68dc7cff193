"""The time loop that all cells share, and the one place that depends on the backend.

A cell hands the loop an elementwise step, and the derivative of that step. The loop
owns the recurrent product, the mask, the states, what is collected over time, and the
gradient.

In both directions of the gradient only the recurrent product and what it depends on
stays in the loop. What the backward loop multiplies by does not depend on the incoming
gradient: a `StepDerivative` makes it of all timesteps at once, before that loop. The
gradient of the recurrent kernel is one product, after it.

Tensors over time are time-major, (T, B, ...), in the order of processing.
"""

import typing

import keras

from keras_bnrnn.gradients import own_gradient

# A recurrent kernel of at most as many numbers is transposed before the backward loop.
# On CPUs that made training steps 5 to 9 % faster at 128 units and slower by as much at
# 250 and 650, where the product reads it across just as well.
TRANSPOSED_AT_MOST = 2**17


class StepDerivative:
    """The derivative of a cell's elementwise step, in closed form.

    Pre-activations are what the step makes its new states of, together with the
    states before: tensors of shape (..., P) for a P of the cell's own. All methods
    but `pull_back` are also called on all timesteps at once.
    """

    def width(self, units):
        """P."""
        raise NotImplementedError

    def pre_activations(self, projected, recurrent, weights):
        """What the forward loop keeps for the gradient, (B, P).

        Args:
            projected: Tensor (B, G*U), the input projection.
            recurrent: Tensor (B, G*U), the recurrent product.
            weights: The weights of the recurrence.
        """
        raise NotImplementedError

    def factors(self, pre_activations, before, after, weights):
        """What `pull_back` multiplies gradients by.

        Args:
            pre_activations: Tensor (T, B, P).
            before, after: Lists of tensors (T, B, U), the states before and after
                each step.
            weights: The weights of the recurrence.

        Returns:
            List of tensors (T, B, ...). Where all of them are 0, nothing flows.
        """
        raise NotImplementedError

    def pull_back(self, gradients, factors):
        """Takes the gradients of one step's new states back through the step.

        Args:
            gradients: List of tensors (B, U).
            factors: List of tensors (B, ...), those of the timestep.

        Returns:
            The gradient of the pre-activations, (B, P), and a list of those of the
            states before (other than through the recurrent product), (B, U) or
            `None` for 0.
        """
        raise NotImplementedError

    def of_recurrent(self, gradient):
        """The gradient of the recurrent product, from that of pre-activations."""
        return gradient

    def of_projected(self, gradient):
        """The gradient of the input projection, from that of pre-activations."""
        return gradient

    def of_weights(self, gradient, before, after, weights):
        """Gradients of weights other than the recurrent kernel and the bias.

        Args:
            gradient: Tensor (T, B, P), that of the pre-activations.
            before, after, weights: As in `factors`.

        Returns:
            Dict from names of fields of the weights to tensors.
        """
        return {}


def time_loop(
    step,
    projected,
    states,
    weights,
    valid=None,
    unroll=False,
    return_sequences=True,
    recurrent_kernel=None,
    collected=(),
    derivative=None,
    keeps=True,
    reads_ahead=False,
):
    """Runs `step` over the timesteps of a projected sequence.

    Where a frame is not valid, the states stay as they are.

    Args:
        step: Function `(projected_t, recurrent_t, states, weights, valid_t)` to
            `(new_states, collected_t)`: what the input projection and the recurrent
            product, each (B, ...), make of the list of states. `valid_t` is a
            boolean tensor (B, 1), or `None` without a mask.
        projected: Tensor of shape (T, B, G*U), the input projection.
        states: List of tensors of shape (B, U); the first one is the output.
        weights: `CellWeights` of the recurrence. `bias` is added to the projection,
            `recurrent_dropout_mask` multiplies the output on its way to the
            recurrent product; the step is given all of them.
        valid: Boolean tensor of shape (T, B, 1), or `None`.
        unroll: Whether to write the loop out; T must be static.
        return_sequences: Whether outputs are kept.
        recurrent_kernel: Tensor of shape (U, ...), multiplied by the output.
            Default: that of the weights.
        collected: `(shape, dtype)` of each tensor in `collected_t`.
        derivative: `StepDerivative` of `step`, which then collects nothing and
            multiplies by the recurrent kernel of the weights. `None`: the backend
            differentiates the loop.
        keeps: With a derivative: whether the loop keeps what the gradient needs, as
            training wants it. Otherwise it takes neither time nor memory for that,
            and a gradient runs the loop again.
        reads_ahead: With a derivative: whether a loop that keeps nothing reads the
            projection one timestep ahead. In XLA's programs for CPUs arithmetic is
            not vectorised where it reads a slice at an index that is only known as
            the loop runs. A copy of the slice, made one turn before, keeps the two
            apart: a GRU then takes half the time. An LSTM, whose tanh of all gates
            stands apart by itself, would only pay for the copy.

    Returns:
        `(outputs, states, collected)`, outputs of shape (T, B, U) or `None`; each
        collected tensor with T in front.

    Raises:
        NotImplementedError: On a Keras backend other than TensorFlow.
    """
    require_backend()
    loop = _Loop(
        step, valid, unroll, return_sequences, recurrent_kernel, collected, reads_ahead
    )
    if derivative is None:
        return loop.run(projected, states, weights)
    return _differentiated(loop, derivative, keeps, projected, states, weights)


def require_backend():
    """Raises NotImplementedError where there is no time loop."""
    if keras.backend.backend() != "tensorflow":
        raise NotImplementedError(
            "The recurrent layers of keras_bnrnn run on the TensorFlow backend of "
            "Keras: set the environment variable KERAS_BACKEND=tensorflow. "
            f"Received: backend={keras.backend.backend()!r}"
        )


def require_timesteps(sequences, name):
    """Refuses sequences without a timestep, as the stock layers do.

    Args:
        sequences: Tensor of shape (B, T, D). A T that is not static is checked when the
            graph runs; XLA's programs have no such check.
        name: Of the layer that was given them.
    """
    if sequences.shape[1] not in (None, 0):
        return
    message = (
        "`sequences` must have at least one timestep. "
        f"Received: sequences of shape (batch, 0, features) in layer {name!r}"
    )
    if sequences.shape[1] == 0:
        raise ValueError(message)
    if keras.backend.backend() == "tensorflow" and not keras.utils.is_keras_tensor(
        sequences
    ):
        import tensorflow as tf

        tf.debugging.assert_positive(tf.shape(sequences)[1], message)


class _Loop(typing.NamedTuple):
    """A time loop, but for the tensors in which it is differentiable."""

    step: typing.Callable
    valid: typing.Any
    unroll: bool
    return_sequences: bool
    recurrent_kernel: typing.Any
    collected: tuple
    reads_ahead: bool

    def run(self, projected, states, weights, keep=None, keep_width=None, slices=False):
        """Outputs, last states and what is collected.

        Args:
            projected, states, weights: As in `time_loop`.
            keep: Function of `projected_t` and `recurrent_t`. What it gives, and then
                all states but the first, are collected, and outputs are kept.
            keep_width: Size of the last axis of what `keep` gives.
            slices: Whether to read timesteps as slices. That costs least, but the
                loop can then not be differentiated: the gradient of a slice is a
                whole sequence, in each timestep.
        """
        import tensorflow as tf

        kernel = self.recurrent_kernel
        if kernel is None:
            kernel = weights.recurrent_kernel
        sequences = [projected, *([] if self.valid is None else [self.valid])]
        specs = [(tf.TensorShape(shape), dtype) for shape, dtype in self.collected]
        if keep is not None:
            specs.append((projected.shape[1:-1] + [keep_width], projected.dtype))
            specs.extend((state.shape, state.dtype) for state in states[1:])
        keeps_outputs = self.return_sequences or keep is not None
        if keeps_outputs:
            specs.insert(0, (states[0].shape, states[0].dtype))

        def body(states, elements):
            projected_t, valid_t = [*elements, None][:2]
            if weights.bias is not None:
                projected_t = projected_t + weights.bias
            recurrent_t = tf.matmul(_dropped(states[0], weights), kernel)
            new_states, kept = self.step(
                projected_t, recurrent_t, states, weights, valid_t
            )
            if valid_t is not None:
                new_states = [
                    tf.where(valid_t, new, old)
                    for new, old in zip(new_states, states, strict=True)
                ]
            kept = list(kept)
            if keep is not None:
                kept += [keep(projected_t, recurrent_t, weights), *new_states[1:]]
            if keeps_outputs:
                kept = [new_states[0], *kept]
            return new_states, kept

        states, stacked = _scan(
            body,
            states,
            sequences,
            specs,
            _length(projected),
            self.unroll,
            slices=slices,
            ahead=self.reads_ahead and slices and keep is None,
        )
        return stacked.pop(0) if keeps_outputs else None, states, stacked


def _dropped(output, weights):
    mask = weights.recurrent_dropout_mask
    return output if mask is None else output * mask


def _length(sequence):
    """T, static where it is known."""
    import tensorflow as tf

    return tf.shape(sequence)[0] if sequence.shape[0] is None else sequence.shape[0]


def _reader(sequence, slices):
    """Function of t that reads a timestep."""
    import tensorflow as tf

    if slices:
        return lambda t: sequence[t]
    array = tf.TensorArray(
        sequence.dtype, size=_length(sequence), element_shape=sequence.shape[1:]
    )
    return array.unstack(sequence).read


def _scan(
    body,
    carry,
    sequences,
    specs,
    timesteps,
    unroll,
    backwards=False,
    slices=True,
    ahead=False,
):
    """Runs `body(carry, elements)`, which returns the next carry and what to keep.

    Args:
        body: See above; lists of tensors. `elements` are those of the timestep.
        carry: The first carry.
        sequences: Tensors (T, ...), read one timestep at a time.
        specs: Shape and dtype of each tensor to keep.
        timesteps: T, an int or a tensor.
        unroll: Whether to write the loop out.
        backwards: Whether t runs from T - 1 to 0.
        slices: Whether to read timesteps as slices. That costs least, but the
            loop can then not be differentiated: the gradient of a slice is a
            whole sequence, in each timestep.
        ahead: Whether to read a timestep one turn ahead, see `time_loop`.

    Returns:
        The last carry and the list of what was kept, (T, ...), in the order of t.
    """
    import tensorflow as tf

    readers = [_reader(sequence, slices or unroll) for sequence in sequences]
    if unroll:
        kept = {}
        for t in reversed(range(timesteps)) if backwards else range(timesteps):
            carry, kept[t] = body(carry, [read(t) for read in readers])
        return list(carry), [
            tf.stack([kept[t][i] for t in range(timesteps)]) for i in range(len(specs))
        ]

    arrays = tuple(
        tf.TensorArray(dtype, size=timesteps, element_shape=shape)
        for shape, dtype in specs
    )
    last = timesteps - 1

    def element_at(i):
        return tuple(read(last - i if backwards else i) for read in readers)

    def loop_body(i, carry, elements, arrays):
        elements_now = elements if ahead else element_at(i)
        carry, kept = body(list(carry), list(elements_now))
        t = last - i if backwards else i
        arrays = tuple(a.write(t, k) for a, k in zip(arrays, kept, strict=True))
        elements = element_at(tf.minimum(i + 1, last)) if ahead else ()
        return i + 1, tuple(carry), elements, arrays

    _, carry, _, arrays = tf.while_loop(
        lambda i, *_: i < timesteps,
        loop_body,
        (tf.constant(0), tuple(carry), element_at(0) if ahead else (), arrays),
        # Known to be finite, the loop can be differentiated under XLA.
        maximum_iterations=timesteps,
        parallel_iterations=32,
        swap_memory=True,
    )
    return list(carry), [a.stack() for a in arrays]


def _differentiated(loop, derivative, keeps, projected, states, weights):
    """`loop.run`, with the gradient that `derivative` gives it."""
    # All tensors in which the loop is differentiable, and nothing else.
    names = [
        name
        for name in weights._fields
        if name not in ("kernel", "recurrent_dropout_mask")
        and getattr(weights, name) is not None
    ]
    count = len(states)

    def unflatten(arguments):
        projected, *rest = arguments
        own = dict(zip(names, rest[count:], strict=True))
        return projected, rest[:count], weights._replace(**own)

    arguments = [projected, *states, *(getattr(weights, name) for name in names)]

    def flat(outputs, states):
        return [outputs, *states] if loop.return_sequences else states

    def plain(*arguments):
        """The loop as TensorFlow can differentiate it, any number of times."""
        outputs, last, _ = loop.run(*unflatten(arguments))
        return flat(outputs, last)

    def keep_all(*arguments):
        """The loop, with the pre-activations and the states over time."""
        width = derivative.width(states[0].shape[-1])
        outputs, last, (kept, *others) = loop.run(
            *unflatten(arguments), derivative.pre_activations, width, slices=True
        )
        return flat(outputs, last), [kept, outputs, *others]

    def keep_nothing(*arguments):
        outputs, last, _ = loop.run(*unflatten(arguments), slices=True)
        return flat(outputs, last), []

    def backward(arguments, kept, upstream):
        if not keeps:
            _, kept = keep_all(*arguments)
        return _backward(loop, derivative, unflatten(arguments), names, kept, upstream)

    run = own_gradient(plain, keep_all if keeps else keep_nothing, backward)
    results = list(run(*arguments))
    outputs = results.pop(0) if loop.return_sequences else None
    return outputs, results, []


def _backward(loop, derivative, arguments, names, kept, upstream):
    """Gradients of the arguments of a loop.

    Args:
        loop, derivative: As in `_differentiated`.
        arguments: `(projected, states, weights)`.
        names: The fields of the weights for which gradients are wanted.
        kept: Pre-activations and the sequence of each state, as the loop kept them.
        upstream: Gradients of the loop's outputs, if it returns them, and states.

    Returns:
        List of the gradients of projected, states and the named weights.
    """
    import tensorflow as tf

    projected, states, weights = arguments
    pre_activations, *after = kept
    before = [
        tf.concat([first[None], sequence[:-1]], axis=0)
        for first, sequence in zip(states, after, strict=True)
    ]
    upstream = list(upstream)
    d_outputs = upstream.pop(0) if loop.return_sequences else None

    factors = derivative.factors(pre_activations, before, after, weights)
    valid = loop.valid
    if valid is not None:
        zero = tf.zeros((), projected.dtype)
        factors = [tf.where(valid, factor, zero) for factor in factors]
        unchanged = tf.cast(tf.logical_not(valid), projected.dtype)
    kernel = weights.recurrent_kernel
    if kernel.shape[0] * kernel.shape[1] <= TRANSPOSED_AT_MOST:
        kernel_transposed = tf.transpose(kernel)

        def times_kernel_transposed(x):
            return tf.matmul(x, kernel_transposed)

    else:

        def times_kernel_transposed(x):
            return tf.matmul(x, kernel, transpose_b=True)

    sequences = list(factors)
    if d_outputs is not None:
        sequences.append(d_outputs)
    if valid is not None:
        sequences.append(unchanged)

    def body(gradients, elements):
        *elements, unchanged_t = elements if valid is not None else [*elements, None]
        *elements, d_output = elements if d_outputs is not None else [*elements, None]
        if d_output is not None:
            gradients = [gradients[0] + d_output, *gradients[1:]]
        gradient, others = derivative.pull_back(gradients, elements)
        d_recurrent = derivative.of_recurrent(gradient)
        through = _dropped(times_kernel_transposed(d_recurrent), weights)
        terms = [[] if other is None else [other] for other in others]
        terms[0].append(through)
        if valid is not None:
            for own, upstream_t in zip(terms, gradients, strict=True):
                own.append(upstream_t * unchanged_t)
        return [tf.add_n(own) for own in terms], [gradient]

    d_states, (gradient,) = _scan(
        body,
        upstream,
        sequences,
        [(pre_activations.shape[1:], pre_activations.dtype)],
        _length(projected),
        loop.unroll,
        backwards=True,
    )

    def flat(sequence):
        return tf.reshape(sequence, [-1, sequence.shape[-1]])

    d_projected = derivative.of_projected(gradient)
    output_before = _dropped(before[0], weights)
    d_weights = {
        "recurrent_kernel": tf.matmul(
            flat(output_before),
            flat(derivative.of_recurrent(gradient)),
            transpose_a=True,
        ),
        **derivative.of_weights(gradient, before, after, weights),
    }
    if weights.bias is not None:
        d_weights["bias"] = tf.reduce_sum(d_projected, axis=[0, 1])
    return [d_projected, *d_states, *(d_weights[name] for name in names)]
