"""Warnings about values, which a compiled step can give while it runs."""

import warnings

import keras


def warn_if(condition, warn):
    """Calls `warn()` in Python where a boolean scalar is true.

    Eager calls test the condition at once; in a graph an operation of its own does,
    in each run. A function that XLA compiles can call nothing: there, and on other
    backends than TensorFlow, nothing is warned of.

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
    """Whether what is traced now is a `tf.function` with `jit_compile=True`.

    TensorFlow exports the function for Keras and its like, not for everybody: a test
    holds it to what it does.
    """
    import tensorflow as tf

    return tf.__internal__.get_enclosing_xla_context() is not None


class Once:
    """Warns of each subject once.

    A plain object, of which Keras neither tracks nor saves anything.
    """

    def __init__(self):
        self._given = set()

    def warn(self, subject, message):
        if subject not in self._given:
            self._given.add(subject)
            warnings.warn(message, stacklevel=2)
