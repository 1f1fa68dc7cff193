"""Tells in which way TensorFlow runs the code that is being called."""

import tensorflow as tf


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
