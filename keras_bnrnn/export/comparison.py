"""Compares the outputs of an exported model with those of the original model."""

import keras
import numpy as np

from keras_bnrnn.export.structure import nested_inputs


class ExportMismatchError(ValueError):
    """Raised if the outputs of an exported model differ from those of the original."""


def answers_of(model, inputs):
    """Runs a model at inference and returns its flat outputs.

    Args:
        model: A Sequential or Functional model.
        inputs: Dict of tensors, in the order of the model's flat inputs.

    Returns:
        List of tensors.
    """
    nested = nested_inputs(model, list(inputs.values()))
    return keras.tree.flatten(model(nested, training=False))


def gap(expected, found):
    """Returns the largest difference between two arrays.

    Args:
        expected: Array.
        found: Array.

    Returns:
        float: for floating-point arrays, the largest absolute difference, divided by
        the largest absolute value of `expected` if this value exceeds 1; for integers,
        booleans and strings, 1 if any element differs and 0 otherwise. Infinity if the
        shapes differ; NaN if a difference is NaN.
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
        tolerance: float, the largest gap that passes.
        what: str, the kind of export for the error message, such as `"file"`.
    """
    # NaN counts as the largest gap, and fails any tolerance.
    name = max(gaps, key=lambda name: (np.isnan(gaps[name]), gaps[name]))
    if not gaps[name] <= tolerance:
        raise ExportMismatchError(
            f"The outputs of the exported {what} must equal the model's, to "
            f"{tolerance:g}. Received: output {name!r}, which differs by "
            f"{gaps[name]:.2g} on random sequences. Nothing was published."
        )
