"""Tells in which way TensorFlow runs the code that is being called."""

import contextlib
import contextvars

import tensorflow as tf

_in_slices = contextvars.ContextVar("in_slices", default=True)


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
def whole_batches():
    """Traces loops that are not cut in slices of the batch.

    A runtime of another format than TensorFlow's does not run slices side by side, and
    its file would hold the weights once for each loop.
    """
    token = _in_slices.set(False)
    try:
        yield
    finally:
        _in_slices.reset(token)


def runs_slices():
    """Returns whether slices of a batch may run side by side, outside `whole_batches`.

    XLA runs one loop after the other.
    """
    return in_plain_graph() and _in_slices.get()
