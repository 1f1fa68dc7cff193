"""Implements the backend functions for TensorFlow."""

import os

import keras
import tensorflow as tf
from keras import ops

from keras_bnrnn.backend import block_lstm as _block_lstm
from keras_bnrnn.backend import context as _context
from keras_bnrnn.backend import loops as _loops
from keras_bnrnn.backend.context import (
    compiled_by_xla,
    in_plain_graph,
    run_by_executor,
)

block_forward = _block_lstm.forward
block_backward = _block_lstm.backward
column_sums = _block_lstm.column_sums
lstm_step_gradient = _block_lstm.step_gradient
lstm_swapped = _block_lstm.swapped
is_traced = _context.is_traced
between = _loops.between
scan = _loops.scan
scan_blocks = _loops.scan_blocks
unstacked = _loops.unstacked


def require_time_loop():
    """Raises NotImplementedError if the backend has no time loop."""


def slice_sizes(batch, least, count=2):
    """Returns the sizes of the slices of a batch whose loops run side by side.

    In a graph on CPUs independent loops run on different cores. XLA and GPUs run one
    loop after the other.

    Args:
        batch: The number of rows, an int or a tensor.
        least: Smaller batches are not sliced.
        count: The number of slices of a batch of known size. Default: 2.

    Returns:
        List of ints; or of two tensors if `batch` is one: the second slice is then
        empty if the batch is not sliced.
    """
    if not run_by_executor() or has_fused_kernels() or cores() < 2:
        return [batch]
    if not isinstance(batch, int):
        second = tf.where(batch < least, 0, batch // 2)
        return [batch - second, second]
    if batch < least:
        return [batch]
    return [(batch + count - 1 - k) // count for k in range(count)]


def cores():
    """Returns the number of CPU cores that TensorFlow uses for independent loops."""
    return tf.config.threading.get_inter_op_parallelism_threads() or os.cpu_count()


def traced_once(function):
    """Returns a function that is traced once for calls with equal shapes and dtypes.

    TensorFlow copies its operations into the graph for each call when it optimises the
    graph, so calls that do not depend on each other run side by side.
    """
    return tf.function(function, autograph=False)


def product_and_bias(x, kernel, bias):
    """Computes `x . kernel + bias` of matrices; a graph fuses the two operations."""
    return plus_bias(tf.matmul(x, kernel), bias)


def plus_bias(product, bias):
    """Adds a bias to a matrix; a graph fuses it with the product before it."""
    if product.dtype == tf.bfloat16:
        # The gradient of `bias_add` adds in bfloat16: see `column_sums`.
        return product + bias
    return tf.nn.bias_add(product, bias)


def add_n(tensors):
    """Adds tensors of one shape."""
    return tensors[0] if len(tensors) == 1 else tf.add_n(tensors)


def sigmoid_gradient(y, gradient):
    """Backpropagates through `y = sigmoid(x)`."""
    return tf.raw_ops.SigmoidGrad(y=y, dy=gradient)


def tanh_gradient(y, gradient):
    """Backpropagates through `y = tanh(x)`."""
    return tf.raw_ops.TanhGrad(y=y, dy=gradient)


def split(x, sizes, axis):
    """Splits a tensor along an axis into parts of given sizes, ints or tensors.

    `keras.ops.split` takes the ends of the parts, and computes their sizes by a dozen
    operations, which are traced in each timestep of a loop.
    """
    return tf.split(x, sizes, axis)


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


def products_by_onednn():
    """Returns whether TensorFlow multiplies matrices by oneDNN on this processor.

    TensorFlow says so in a private module only. By default it does so on processors
    with AVX-512.
    """
    try:
        from tensorflow.python.util import _pywrap_util_port as port

        return bool(port.IsMklEnabled())
    except (ImportError, AttributeError):
        return False


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
