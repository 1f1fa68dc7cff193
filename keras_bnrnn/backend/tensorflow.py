"""The TensorFlow backend."""

import keras
import tensorflow as tf
from keras import ops


def require_time_loop():
    """Raises NotImplementedError if the backend has no time loop."""


def scan(
    body,
    carry,
    sequences,
    specs,
    length,
    unroll=False,
    reverse=False,
    differentiable=False,
    ahead=False,
):
    """Runs `body(carry, elements)`, which returns the next carry and what to stack.

    Args:
        body: See above; `carry`, `elements` and the results are lists of tensors.
            `elements` are those of the timestep.
        carry: The first carry.
        sequences: Tensors of shape (T, ...), read one timestep at a time.
        specs: Shape and dtype of each tensor to stack.
        length: T, an int or a tensor.
        unroll: Whether to write the loop out; T must be an int.
        reverse: Whether t runs from T - 1 to 0.
        differentiable: Whether the backend can differentiate the loop. Otherwise
            timesteps are read as slices. That costs least, but the gradient of a slice
            is a whole sequence, in each timestep.
        ahead: Whether to read each timestep one turn ahead. Not with `unroll`.

    Returns:
        The last carry, and the list of stacked tensors (T, ...) in the order of t.
    """
    readers = [
        _reader(sequence, length, differentiable and not unroll)
        for sequence in sequences
    ]
    if unroll:
        kept = {}
        for t in reversed(range(length)) if reverse else range(length):
            carry, kept[t] = body(carry, [read(t) for read in readers])
        return list(carry), [
            tf.stack([kept[t][i] for t in range(length)]) for i in range(len(specs))
        ]

    arrays = tuple(
        tf.TensorArray(dtype, size=length, element_shape=tf.TensorShape(shape))
        for shape, dtype in specs
    )
    last = length - 1

    def elements_at(i):
        return tuple(read(last - i if reverse else i) for read in readers)

    def loop_body(i, carry, elements, arrays):
        elements_now = elements if ahead else elements_at(i)
        carry, kept = body(list(carry), list(elements_now))
        t = last - i if reverse else i
        arrays = tuple(a.write(t, k) for a, k in zip(arrays, kept, strict=True))
        elements = elements_at(tf.minimum(i + 1, last)) if ahead else ()
        return i + 1, tuple(carry), elements, arrays

    _, carry, _, arrays = tf.while_loop(
        lambda i, *_: i < length,
        loop_body,
        (tf.constant(0), tuple(carry), elements_at(0) if ahead else (), arrays),
        # XLA differentiates a loop of a known number of turns only.
        maximum_iterations=length,
        parallel_iterations=32,
        swap_memory=True,
    )
    return list(carry), [a.stack() for a in arrays]


def _reader(sequence, length, differentiable):
    """A function of t that reads a timestep."""
    if not differentiable:
        return lambda t: sequence[t]
    array = tf.TensorArray(
        sequence.dtype, size=length, element_shape=sequence.shape[1:]
    )
    return array.unstack(sequence).read


def times_transposed(x, matrix):
    """`x . matrix'`, without a transposed copy of the matrix."""
    return tf.matmul(x, matrix, transpose_b=True)


def transposed_times(x, y):
    """`x' . y`, without a transposed copy of x."""
    return tf.matmul(x, y, transpose_a=True)


def custom_gradient(plain, forward, backward):
    """A function with a given gradient, whose own derivatives come from `plain`.

    A closed-form gradient uses values that the forward pass kept. The backend takes
    them for constants, so differentiating the gradient would be silently wrong. Here
    second derivatives differentiate `plain`, which computes the same outputs from the
    arguments alone. Jacobians go through the gradient.

    Args:
        plain: Function of tensors to a list of tensors, differentiable by the backend.
        forward: The same function, to `(outputs, kept)`; `kept` is a list of tensors.
        backward: Function `(arguments, kept, upstream)` of three lists to the list of
            the gradients of the arguments.

    Returns:
        Function of tensors to a list of tensors.
    """

    def gradient_of(arguments, kept):
        n, m = len(arguments), len(kept)

        @tf.custom_gradient
        def gradient(*tensors):
            tensors = list(tensors)
            given, upstream = tensors[:n], tensors[n + m :]
            gradients = backward(given, tensors[n : n + m], upstream)

            def second(*directions):
                variables = [*given, *upstream]
                with tf.GradientTape() as outer:
                    outer.watch(variables)
                    with tf.GradientTape() as inner:
                        inner.watch(given)
                        outputs = plain(*given)
                    first = inner.gradient(
                        outputs,
                        given,
                        output_gradients=upstream,
                        unconnected_gradients="zero",
                    )
                result = outer.gradient(
                    first,
                    variables,
                    output_gradients=list(directions),
                    unconnected_gradients="zero",
                )
                # The kept values depend on the arguments, whose gradients include
                # theirs. `None`, not zeros: zeros would go back through the loop.
                return [*result[:n], *[None] * m, *result[n:]]

            return gradients, second

        def of_upstream(*upstream):
            # The gradient of `tf.gather` is sparse.
            upstream = [tf.convert_to_tensor(d) for d in upstream]
            return gradient(*arguments, *kept, *upstream)

        return of_upstream

    @tf.custom_gradient
    def function(*arguments):
        outputs, kept = forward(*arguments)
        return outputs, gradient_of(arguments, kept)

    return function


def value_and_slope(function, x):
    """An elementwise function and its derivative at `x`, a tensor of any shape."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    return y, tape.gradient(y, x, unconnected_gradients="zero")


def replica_count():
    """Replicas of the current `tf.distribute` strategy; 1 if there is none."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(x):
    """The sum of `x` over the replicas of the current `tf.distribute` strategy.

    Differentiable. Without a strategy, and with one replica, `x` itself.
    """
    if replica_count() > 1 and not tf.distribute.in_cross_replica_context():
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, x)
    return x


def compiled(function, example, open_axes):
    """A compiled function of batches, traced for as many of them as possible.

    Args:
        function: Function of a nested structure of tensors.
        example: A structure as it will be given.
        open_axes: Function of a rank to the set of axes whose sizes differ by batch.
    """

    def spec(value):
        if not isinstance(value, tf.Tensor):
            return tf.type_spec_from_value(value)
        open_ = open_axes(value.shape.rank)
        shape = [None if i in open_ else n for i, n in enumerate(value.shape)]
        return tf.TensorSpec(shape, value.dtype)

    run = tf.function(function, reduce_retracing=True)
    run.get_concrete_function(keras.tree.map_structure(spec, example))
    return run


def compiled_by_xla():
    """Whether XLA compiles the function that is being traced.

    `tf.__internal__` is no stable API: a test fails if this function of it changes.
    """
    return tf.__internal__.get_enclosing_xla_context() is not None


def call_if(condition, function):
    """Calls `function()` in Python if a boolean scalar is true.

    An eager call tests the condition at once. In a graph, an operation tests it in each
    run. Under XLA, which cannot call Python, this does nothing. A `tf.function` that
    was traced outside XLA must not be called from one that XLA compiles.

    Args:
        condition: Boolean scalar tensor.
        function: Function without arguments and result.
    """
    if tf.executing_eagerly():
        if bool(condition):
            function()
    elif not compiled_by_xla():

        def call():
            tf.py_function(function, [], [])
            return tf.constant(0)

        tf.cond(condition, call, lambda: tf.constant(0))


def require_positive(value, message):
    """Raises an error as the graph runs if a size is not positive (not under XLA)."""
    tf.debugging.assert_positive(value, message)


def graph_of(tensor):
    """The graph that a tensor belongs to; `None` for an eager one."""
    return getattr(tensor, "graph", None)


def has_fused_kernels():
    """Whether the backend computes on a GPU, which has cuDNN's kernels."""
    return bool(tf.config.list_logical_devices("GPU"))


class FusedKernel:
    """Runs a recurrence by cuDNN: through the stock Keras layer of its equations.

    A plain object: Keras does not find the stock layer in it, and never trains, saves
    or counts its weights.

    Args:
        kind: `"lstm"` or `"gru"`.
        units: U.
        dtype: Dtype policy.
    """

    def __init__(self, kind, units, dtype):
        stock = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU}[kind]
        self.stock = stock(
            units,
            return_sequences=True,
            return_state=True,
            use_cudnn="auto",
            # The weights are never used: draw no random numbers for them.
            kernel_initializer="zeros",
            recurrent_initializer="zeros",
            seed=0,
            dtype=dtype,
        )

    def build(self, input_shape):
        if not self.stock.built:
            self.stock.build(input_shape)

    def __call__(self, sequences, states, weights, lengths=None):
        """
        Args:
            sequences: Tensor of shape (B, T, D).
            states: List of tensors of shape (B, U).
            weights: The weights of the stock layer, in its order and shapes.
            lengths: int32 tensor (B,), each at least 1; `None` for T.

        Returns:
            Outputs (B, T, U) and the list of the states after each row's length.
            Outputs past it are finite but unspecified.
        """
        mask = None
        if lengths is not None:
            mask = ops.arange(ops.shape(sequences)[1]) < lengths[:, None]
        (outputs, *states), _ = self.stock.stateless_call(
            weights,
            # The state of a seed generator, which nothing draws from.
            [ops.zeros(v.shape, v.dtype) for v in self.stock.non_trainable_variables],
            sequences,
            initial_state=list(states),
            mask=mask,
            training=False,  # no dropout here; the kernels keep what gradients need
        )
        return outputs, states
