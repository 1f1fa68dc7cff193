"""Tells in which way TensorFlow runs the code that is being called."""

import contextlib
import contextvars

import tensorflow as tf

_for_executor = contextvars.ContextVar("for_executor", default=True)


def is_traced():
    """Returns whether a function is being traced, rather than run eagerly."""
    return not tf.executing_eagerly()


def in_plain_graph():
    """Returns whether a graph is being traced that XLA does not compile.

    There a stack of tensors is a copy, and independent loops run side by side.
    """
    return is_traced() and not compiled_by_xla()


def compiled_by_xla():
    """Returns whether XLA compiles the function that is being traced.

    `tf.__internal__` is not a stable API. A test fails if the function used here
    changes.
    """
    return tf.__internal__.get_enclosing_xla_context() is not None


@contextlib.contextmanager
def simple_loops():
    """Traces loops as runtimes other than TensorFlow's run them best.

    A batch is one loop, and a turn of the loop is one timestep. Other runtimes do not
    run slices of the batch side by side, and have less to gain from longer turns. Their
    files would hold the weights once for each loop.
    """
    token = _for_executor.set(False)
    try:
        yield
    finally:
        _for_executor.reset(token)


def run_by_executor():
    """Returns whether TensorFlow's executor will run the graph that is being traced.

    The executor runs independent loops side by side, and schedules each operation.
    XLA does neither. Not so inside `simple_loops`.
    """
    return in_plain_graph() and _for_executor.get()
