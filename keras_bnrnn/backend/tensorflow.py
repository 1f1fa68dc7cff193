"""Implements the backend functions for TensorFlow."""

import os

import keras
import tensorflow as tf
from keras import ops

from keras_bnrnn.backend import block_lstm as _block_lstm

block_forward = _block_lstm.forward
block_backward = _block_lstm.backward


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
    stacks=None,
    turns=None,
):
    """Runs a loop over timesteps.

    Args:
        body: Function `body(carry, elements)` of two lists of tensors. `elements` holds
            the timestep of each sequence. It returns the next carry and the list of the
            tensors to stack.
        carry: List of tensors, the first carry.
        sequences: Tensors of shape (T, ...), read one timestep at a time. An element
            may be what `unstacked` returns.
        specs: Shape and dtype of each tensor to stack.
        length: T, an int or a tensor.
        unroll: Whether to unroll the loop. T must then be an int. Default: `False`.
        reverse: Whether t runs from T - 1 to 0. Default: `False`.
        differentiable: Whether the backend can differentiate the loop. Otherwise
            timesteps are read as slices. Slices cost least, but the gradient of each
            slice has the size of the whole sequence. Default: `False`.
        ahead: Whether to read each timestep one turn ahead. It has no effect with
            `unroll`. Default: `False`.
        stacks: The number of tensors to stack, the first ones of `specs`. Where
            `in_plain_graph()`, the other ones are left as they are, one tensor for each
            timestep. `None` (default): all are stacked.
        turns: The number of turns, T or 0, an int or a tensor. Stacked tensors are 0 if
            there is no turn. `None` (default): T.

    Returns:
        The last carry, and the list of stacked tensors (T, ...) in the order of t. For
        tensors left unstacked the list has what `unstacked` needs.
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

    end = length if turns is None else turns
    _, carry, _, arrays = tf.while_loop(
        lambda i, *_: i < end,
        loop_body,
        (tf.constant(0), tuple(carry), elements_at(0) if ahead else (), arrays),
        # XLA differentiates a loop of a known number of turns only.
        maximum_iterations=length,
        parallel_iterations=32,
        swap_memory=True,
    )
    rows = tf.shape(carry[0])[:1] if carry else None

    def result(i):
        if stacks is not None and i >= stacks and in_plain_graph():
            return arrays[i].flow
        if turns is None:
            return arrays[i].stack()
        return Unstacked(arrays[i].flow, specs[i]).stack(rows)

    return list(carry), [result(i) for i in range(len(specs))]


def scan_blocks(
    body, carry, sequences, specs, length, block, sums, of_block, turns=None
):
    """Runs a loop from the last timestep to the first, and sums over blocks of it.

    In a plain graph, the tensors of a block of timesteps are stacked and summed while
    they are in the cache. XLA has one block.

    Args:
        body, carry, sequences, turns: As for `scan`.
        specs: Shape and dtype of each tensor to stack. The stack of the first one is
            returned.
        length: T, an int or a tensor.
        block: The number of timesteps of a block, an int or a tensor.
        sums: List of tensors, where the sums start.
        of_block: Function `(carry, stacks, start, end)` that returns the list of what
            the timesteps from `start` to before `end` add to the sums. `carry` is what
            the block starts from, `stacks` are its tensors (end - start, ...).

    Returns:
        The last carry, the stack (T, ...) of the first tensors, and the list of sums.
    """
    if not in_plain_graph():
        last, stacks = scan(
            body, carry, sequences, specs, length, reverse=True, turns=turns
        )
        return last, stacks[0], _added(sums, of_block(carry, stacks, 0, length))

    readers = [_reader(sequence, length, False) for sequence in sequences]
    blocks = -(-length // block)
    if turns is not None:
        blocks = tf.where(tf.equal(turns, 0), 0, blocks)
    shapes = [tf.TensorShape(shape) for shape, _ in specs]

    def run_block(k, carry, sums, array):
        start = k * block
        end = tf.minimum(start + block, length)
        lists = tuple(
            tf.TensorArray(dtype, size=end - start, element_shape=shape)
            for shape, (_, dtype) in zip(shapes, specs, strict=True)
        )

        def loop_body(t, carry, lists):
            carry, kept = body(list(carry), [read(t) for read in readers])
            lists = tuple(
                one.write(t - start, tensor)
                for one, tensor in zip(lists, kept, strict=True)
            )
            return t - 1, tuple(carry), lists

        _, after, lists = tf.while_loop(
            lambda t, *_: t >= start,
            loop_body,
            (end - 1, carry, lists),
            parallel_iterations=32,
        )
        stacks = [one.stack() for one in lists]
        sums = _added(sums, of_block(list(carry), stacks, start, end))
        return k - 1, after, tuple(sums), array.write(k, stacks[0])

    array = tf.TensorArray(
        specs[0][1],
        size=blocks,
        element_shape=tf.TensorShape([None, *shapes[0]]),
        infer_shape=False,
    )
    _, carry, sums, array = tf.while_loop(
        lambda k, *_: k >= 0,
        run_block,
        (blocks - 1, tuple(carry), tuple(sums), array),
    )
    shape, dtype = specs[0]
    rows = tf.shape(carry[0])[0]
    stack = tf.raw_ops.TensorListConcatV2(
        input_handle=array.flow,
        # In full: there is no turn, and no shape to read, without rows.
        element_shape=tf.stack([-1, rows, *shape[1:]]),
        leading_dims=tf.zeros([0], tf.int64),
        element_dtype=dtype,
    ).tensor
    known = length if isinstance(length, int) else None
    if turns is not None:
        stack = tf.reshape(stack, [length, rows, *shape[1:]])
    return list(carry), tf.ensure_shape(stack, (known, *shape)), list(sums)


def _added(sums, terms):
    """Adds two lists of tensors, one by one."""
    return [a + b for a, b in zip(sums, terms, strict=True)]


def is_traced():
    """Returns whether a function is being traced, rather than run eagerly."""
    return not tf.executing_eagerly()


def in_plain_graph():
    """Returns whether a graph is being traced that XLA does not compile.

    There a stack of tensors is a copy, and independent loops run side by side.
    """
    return is_traced() and not compiled_by_xla()


class Unstacked:
    """A sequence of T tensors of one shape, as `tf.TensorArray` holds them in a graph.

    Args:
        handle: Variant tensor, the `flow` of a `tf.TensorArray`.
        spec: Shape and dtype of a timestep.
    """

    def __init__(self, handle, spec):
        self._handle = handle
        self._shape, self._dtype = tf.TensorShape(spec[0]), spec[1]

    def read(self, t):
        element = tf.raw_ops.TensorListGetItem(
            input_handle=self._handle,
            index=t,
            element_shape=tf.constant(-1),  # any
            element_dtype=self._dtype,
        )
        element.set_shape(self._shape)
        return element

    def between(self, start, end, rows):
        """Stacks the timesteps from `start` to before `end`; `rows` as in `stack`."""
        stack = tf.raw_ops.TensorListGather(
            input_handle=self._handle,
            indices=tf.range(start, end),
            element_shape=self._full_shape(rows),
            element_dtype=self._dtype,
        )
        return tf.ensure_shape(stack, (None, *self._shape))

    def _full_shape(self, rows):
        if self._shape.rank and self._shape[0] is None:
            return tf.concat([rows, self._shape[1:]], axis=0)
        return self._shape

    def stack(self, rows):
        """Stacks the tensors (B, ...), zeros where no turn of a loop wrote one.

        Args:
            rows: int32 tensor of shape (1,), B.
        """
        stack = tf.raw_ops.TensorListStack(
            input_handle=self._handle,
            element_shape=self._full_shape(rows),
            element_dtype=self._dtype,
        )
        return tf.ensure_shape(stack, (None, *self._shape))


def unstacked(tensor, spec):
    """Makes a sequence that `scan` reads from a tensor that it left unstacked.

    Args:
        tensor: The tensor.
        spec: Shape and dtype of a timestep.
    """
    return Unstacked(tensor, spec) if tensor.dtype == tf.variant else tensor


def between(sequence, start, end, like):
    """Stacks the timesteps from `start` to before `end` of a sequence.

    Args:
        sequence: As `unstacked` returns it, of tensors (B, F).
        start, end: Ints or scalar tensors.
        like: Tensor of B rows.
    """
    if not isinstance(sequence, Unstacked):
        return sequence[start:end]
    return sequence.between(start, end, tf.shape(like)[:1])


def slice_sizes(batch, least):
    """Returns the sizes of the slices of a batch whose loops run side by side.

    In a graph on CPUs independent loops run on different cores. XLA and GPUs run one
    loop after the other.

    Args:
        batch: The number of rows, an int or a tensor.
        least: Smaller batches are not sliced.

    Returns:
        List of ints; or of tensors if `batch` is one: the second slice is then empty if
        the batch is not sliced.
    """
    if not in_plain_graph() or has_fused_kernels() or cores() < 2:
        return [batch]
    if not isinstance(batch, int):
        second = tf.where(batch < least, 0, batch // 2)
        return [batch - second, second]
    return [batch] if batch < least else [batch - batch // 2, batch // 2]


def cores():
    """Returns the number of CPU cores that TensorFlow uses for independent loops."""
    return tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count()


def product_and_bias(x, kernel, bias):
    """Computes `x . kernel + bias` of matrices; a graph fuses the two operations."""
    return plus_bias(tf.matmul(x, kernel), bias)


def plus_bias(product, bias):
    """Adds a bias to a matrix; a graph fuses it with the product before it."""
    return tf.nn.bias_add(product, bias)


def split_rows(x, sizes, axis):
    """Splits a tensor along an axis into parts of given sizes, ints or tensors."""
    return tf.split(x, sizes, axis)


def _reader(sequence, length, differentiable):
    """Returns a function that reads the timestep t of a sequence."""
    if isinstance(sequence, Unstacked):
        return sequence.read
    if not differentiable:
        return lambda t: sequence[t]
    array = tf.TensorArray(
        sequence.dtype, size=length, element_shape=sequence.shape[1:]
    )
    return array.unstack(sequence).read


def transposed_times(x, y):
    """Computes `x' . y` without a transposed copy of x."""
    return tf.matmul(x, y, transpose_a=True)


def custom_gradient(plain, forward, backward):
    """Returns a function with a custom gradient that can be differentiated again.

    A custom gradient uses values that the forward pass kept. The backend treats them as
    constants, so differentiating the gradient would be silently wrong. Second
    derivatives therefore differentiate `plain`, which computes the same outputs from
    the arguments alone. Jacobians use the custom gradient.

    Args:
        plain: Function of tensors that returns a list of tensors. The backend can
            differentiate it.
        forward: The same function, but it returns `(outputs, kept)`. `kept` is a list
            of tensors.
        backward: Function `(arguments, kept, upstream)` of three lists that returns the
            list of the gradients of the arguments.

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
                # The gradients of the arguments already include those of the kept
                # values. Zeros instead of `None` would run the backward loop once more.
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
    """Returns an elementwise function and its derivative at a tensor `x`."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    return y, tape.gradient(y, x, unconnected_gradients="zero")


def replica_count():
    """Returns the number of replicas of the current `tf.distribute` strategy, or 1."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(x):
    """Sums `x` over the replicas of the current `tf.distribute` strategy.

    The sum is differentiable. Without a strategy, or with one replica, it is `x`.
    """
    if replica_count() > 1 and not tf.distribute.in_cross_replica_context():
        context = tf.distribute.get_replica_context()
        return context.all_reduce(tf.distribute.ReduceOp.SUM, x)
    return x


def compiled(function, example, open_axes):
    """Compiles a function of batches, with one trace for as many shapes as possible.

    Args:
        function: Function of a nested structure of tensors.
        example: A structure of the kind that the function will be called with.
        open_axes: Function that returns, for the rank of a tensor, the set of its axes
            whose sizes differ between batches.

    Returns:
        The compiled function.
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
    """Returns whether XLA compiles the function that is being traced.

    `tf.__internal__` is not a stable API. A test fails if the function used here
    changes.
    """
    return tf.__internal__.get_enclosing_xla_context() is not None


def call_if(condition, function):
    """Calls `function()` in Python if a boolean scalar is true.

    An eager call tests the condition at once. In a graph, an operation tests the
    condition in each run. XLA cannot call Python, so under XLA this does nothing. A
    `tf.function` traced outside XLA must not be called from one that XLA compiles.

    Args:
        condition: Boolean scalar tensor.
        function: Function without arguments that returns nothing.
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
    """Raises an error if a size is not positive, when the graph runs. Not under XLA."""
    tf.debugging.assert_positive(value, message)


def summary_writer(folder):
    """Returns a writer of event files for TensorBoard, with the method `close`."""
    return tf.summary.create_file_writer(os.fspath(folder))


def write_summaries(writer, scalars, histograms, step):
    """Writes values to an event file.

    Args:
        writer: What `summary_writer` returned.
        scalars: Dict from tag to number.
        histograms: Dict from tag to array.
        step: Int, such as the epoch.
    """
    with writer.as_default(step=step):
        for tag, value in scalars.items():
            tf.summary.scalar(tag, value)
        for tag, values in histograms.items():
            tf.summary.histogram(tag, values)
    writer.flush()


def graph_of(tensor):
    """Returns the graph that a tensor belongs to, or `None` for an eager tensor."""
    return getattr(tensor, "graph", None)


def has_block(name):
    """Returns whether there are operations for whole sequences, and CPUs to run them.

    Args:
        name: `"lstm"`, or another value, for which there are none.
    """
    return name == "lstm" and in_plain_graph() and not has_fused_kernels()


def has_fused_kernels():
    """Returns whether there is a GPU, and with it cuDNN's kernels."""
    return bool(tf.config.list_logical_devices("GPU"))


class FusedKernel:
    """Runs a recurrence by cuDNN, through the stock Keras layer of its equations.

    This is a plain object: Keras does not find the stock layer in it, and does not
    train, save or count the weights of the stock layer.

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
        """Runs the recurrence.

        Args:
            sequences: Tensor of shape (B, T, D).
            states: List of tensors of shape (B, U).
            weights: List of the weights of the stock layer, in its order and shapes.
            lengths: int32 tensor (B,), the lengths of the rows, each at least 1. `None`
                (default): all rows have T frames.

        Returns:
            Outputs (B, T, U) and the list of the states (B, U) at the end of each row.
            Outputs past the end of a row are finite but unspecified.
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
