"""Warnings about values, which a compiled step can give while it runs."""

import warnings

import keras


def warn_if(condition, warn):
    """Calls `warn()` in Python where a boolean scalar is true.

    An eager call tests the condition at once. In a graph, an operation tests it in
    each run. A function that XLA compiles cannot call Python: there, and on other
    backends than TensorFlow, this does nothing. A `tf.function` that was traced outside
    of XLA must not be called from one that XLA compiles.

    Args:
        condition: Boolean scalar tensor.
        warn: Function without arguments and result.
    """
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    if tf.executing_eagerly():
        if bool(condition):
            warn()
    elif not is_compiled_by_xla():

        def call():
            tf.py_function(warn, [], [])
            return tf.constant(0)

        tf.cond(condition, call, lambda: tf.constant(0))


def is_compiled_by_xla():
    """Whether the function that is being traced is a `jit_compile=True` one.

    `tf.__internal__` is no stable API: a test fails if this function of it changes.
    """
    import tensorflow as tf

    return tf.__internal__.get_enclosing_xla_context() is not None


class Once:
    """Gives the warning of each subject once.

    A plain object: Keras neither tracks nor saves it.
    """

    def __init__(self):
        self._given = set()

    def warn(self, subject, message):
        if subject not in self._given:
            self._given.add(subject)
            warnings.warn(message, stacklevel=2)
