"""Checks arguments, for all modules: an error names the argument and its value."""

import contextlib
import math
import numbers

import keras
import numpy as np


def is_number(value):
    """Returns whether a value is a real number, also of NumPy, and not a boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value):
    """Returns whether a value is an integer, also of NumPy, and not a boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_flag(name, value):
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")


def check_positive_integer(name, value, optional=False):
    if optional and value is None:
        return
    if not is_integer(value) or value < 1:
        raise ValueError(
            f"`{name}` must be a positive integer{' or None' * optional}. "
            f"Received: {name}={value!r}"
        )


def check_positive_number(name, value):
    if not is_number(value) or not 0.0 < value < math.inf:
        raise ValueError(
            f"`{name}` must be a finite number greater than 0. "
            f"Received: {name}={value!r}"
        )


def check_training(training):
    """Raises an error for a `training` that only Python's truth value makes a flag."""
    if training is None or isinstance(training, (bool, np.bool_)):
        return
    if is_integer(training) and training in (0, 1):
        return
    if keras.ops.is_tensor(training) and len(training.shape) == 0:
        return
    raise ValueError(
        f"`training` must be True, False or None. Received: training={training!r}"
    )


def check_verbose(verbose):
    if not isinstance(verbose, numbers.Integral) or verbose not in (0, 1, 2):
        raise ValueError(f"`verbose` must be 0, 1 or 2. Received: verbose={verbose!r}")


def check_dtype(policy, received=None):
    """Raises an error for a dtype policy that does not compute in floating point.

    Args:
        policy: A dtype policy.
        received: The argument `dtype`. Default: the name of the policy.
    """
    quantized = getattr(policy, "quantization_mode", None) is not None
    if quantized or policy.compute_dtype not in FLOATS:
        received = policy.name if received is None else received
        raise ValueError(
            "`dtype` must be a floating-point dtype or a policy that computes in one: "
            f"{', '.join(FLOATS)}, mixed_float16 or mixed_bfloat16. "
            f"Received: dtype={received!r}"
        )


FLOATS = ("float16", "bfloat16", "float32", "float64")


def check_numeric(name, tensor):
    """Raises an error for a tensor of strings, or a value that is not a tensor."""
    if not hasattr(tensor, "shape") or not hasattr(tensor, "dtype"):
        raise ValueError(f"`{name}` must be a tensor. Received: {name}={tensor!r}")
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if dtype == "string":
        raise ValueError(
            f"`{name}` must be a tensor of numbers. Received: {name} of dtype {dtype!r}"
        )


def check_states(name, states, sizes, rows):
    """Raises an error if states are not those of a recurrence.

    Args:
        name: The name of the argument.
        states: A tensor, or a list or tuple of tensors.
        sizes: List of ints, the width of each state.
        rows: The batch size, or `None` if it is not known.
    """
    several = states if isinstance(states, (list, tuple)) else [states]
    shapes = [getattr(state, "shape", None) for state in several]

    def fits(shape, size):
        if shape is None or len(shape) != 2:
            return False
        known = shape[0] is not None and rows is not None
        return shape[1] in (size, None) and not (known and shape[0] != rows)

    if len(shapes) != len(sizes) or not all(map(fits, shapes, sizes)):
        expected = [(rows if rows is not None else "batch", size) for size in sizes]
        received = f"{name}={states!r}"
        if None not in shapes:
            received = f"{name} of shapes {[tuple(shape) for shape in shapes]}"
        raise ValueError(
            f"`{name}` must have a tensor of shape (batch, units) for each state: "
            f"{expected}. Received: {received}"
        )


@contextlib.contextmanager
def naming_arguments(arguments):
    """Names the argument in Keras' errors about identifiers.

    Keras says which initializer it does not know, for example, but not for which
    argument it was given.

    Args:
        arguments: Dict of the arguments that the body passes to Keras.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        for name, value in arguments.items():
            kind = name.rpartition("_")[2]
            if kind in READERS and value is not None:
                read, what = READERS[kind]
                try:
                    read(value)
                except (TypeError, ValueError) as reason:
                    raise ValueError(
                        f"`{name}` must be {what}. Received: {name}={value!r}. "
                        f"Keras: {reason}"
                    ) from error
        raise


_NAME_OR_OBJECT = "the name of {0} of Keras, its config, {0} or None"
READERS = {
    "activation": (
        keras.activations.get,
        "the name of an activation of Keras, a function of a tensor or None",
    ),
    "initializer": (
        keras.initializers.get,
        _NAME_OR_OBJECT.format("an initializer"),
    ),
    "regularizer": (
        keras.regularizers.get,
        _NAME_OR_OBJECT.format("a regularizer"),
    ),
    "constraint": (keras.constraints.get, _NAME_OR_OBJECT.format("a constraint")),
    "dtype": (keras.dtype_policies.get, "the name of a dtype or a dtype policy"),
}
