"""Implements the backend functions for Keras backends without a time loop.

`SequenceBatchNorm` and the functions on tensors work on these backends: a distributed
batch is one tensor, and the backend differentiates. The recurrent layers raise
`NotImplementedError`.
"""

import itertools

import keras

FusedKernel = None
block_forward = block_backward = lstm_step_gradient = lstm_swapped = None
add_n = column_sums = sigmoid_gradient = tanh_gradient = None


def has_block(name):
    return False


def products_by_onednn():
    return False


def cores():
    return 1


def has_fused_kernels():
    return False


def require_time_loop():
    raise NotImplementedError(
        "The recurrent layers of keras_bnrnn run on the TensorFlow backend of Keras: "
        "set the environment variable KERAS_BACKEND=tensorflow. "
        f"Received: backend={keras.backend.backend()!r}"
    )


def scan(*arguments, **options):
    require_time_loop()


def scan_blocks(*arguments, **options):
    require_time_loop()


def compiled(function, example, open_axes):
    return function


def compiled_by_xla():
    return False


def call_if(condition, function):
    pass


def custom_gradient(plain, forward, backward):
    return lambda *arguments: plain(*arguments)


def value_and_slope(function, x):
    require_time_loop()


def is_traced():
    return False


def in_plain_graph():
    return False


def run_by_executor():
    return False


def slice_sizes(batch, least, count=2):
    return [batch]


def split(x, sizes, axis):
    return keras.ops.split(x, list(itertools.accumulate(sizes))[:-1], axis)


def traced_once(function):
    return function


def between(sequence, start, end, like):
    return sequence[start:end]


def unstacked(tensor, spec):
    return tensor


def product_and_bias(x, kernel, bias):
    return keras.ops.matmul(x, kernel) + bias


def plus_bias(product, bias):
    return product + bias


def transposed_times(x, y):
    return keras.ops.matmul(keras.ops.transpose(x), y)


def replica_count():
    return 1


def sum_over_replicas(x):
    return x


def require_positive(value, message):
    pass


def summary_writer(folder):
    raise NotImplementedError(
        "Event files for TensorBoard are written on the TensorFlow backend of Keras "
        f"only: pass `log_dir=None`. Received: backend={keras.backend.backend()!r}"
    )


def write_summaries(writer, scalars, histograms, step):
    summary_writer(None)


def graph_of(tensor):
    return None
