"""Compares the answers of an export with those of the model it was made from."""

import keras
import numpy as np

from keras_bnrnn.export.structure import nested_inputs


class ExportMismatchError(ValueError):
    """The answers of an export differ from those of its model."""


def answers_of(model, inputs):
    """The flat outputs of a model at inference.

    Args:
        model: A Sequential or Functional model.
        inputs: Dict of tensors, in the order of the flat inputs of the model.

    Returns:
        List of tensors.
    """
    nested = nested_inputs(model, list(inputs.values()))
    return keras.tree.flatten(model(nested, training=False))


def gap(expected, found):
    """The largest difference of two arrays.

    Args:
        expected: Array.
        found: Array.

    Returns:
        float: for numbers, relative to the largest of `expected` if that exceeds 1; for
        integers, booleans and strings, 1 if any differs and 0 if none does. Infinity if
        the shapes differ, NaN if a difference is NaN.
    """
    expected, found = np.asarray(expected), np.asarray(found)
    if expected.shape != found.shape:
        return float("inf")
    if expected.dtype.kind in "iubO":
        return float(np.any(expected != found))
    expected = expected.astype("float32")
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    return float(np.abs(expected - found).max(initial=0.0) / scale)


def require_small(gaps, tolerance, what):
    """Raises `ExportMismatchError` if an output differs by more than the tolerance.

    Args:
        gaps: Dict from the name of an output to its gap.
        tolerance: float.
        what: What was exported, such as `"file"`.
    """
    # NaN counts as the largest difference, and is not below the tolerance.
    name = max(gaps, key=lambda name: (np.isnan(gaps[name]), gaps[name]))
    if not gaps[name] <= tolerance:
        raise ExportMismatchError(
            f"The exported {what} must answer as the model does, to {tolerance:g}. "
            f"Received: output {name!r}, which differs by {gaps[name]:.2g} on random "
            "sequences. Nothing was published."
        )
