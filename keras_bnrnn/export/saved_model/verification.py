"""Compares a version with its model before the version is published."""

import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_bnrnn.export.comparison import answers_of, gap, require_small
from keras_bnrnn.export.examples import shortest_timesteps
from keras_bnrnn.export.masks import destroys_masks, reverses_time
from keras_bnrnn.export.names import LENGTHS
from keras_bnrnn.traversal import sublayers


def compare(model, served, serve, tolerance):
    """Compares the outputs of a version with its model on random ragged sequences.

    The outputs for each row of a padded batch must equal the model's outputs for this
    row alone. If `serve` takes no lengths, the batch has no padding.

    Args:
        model: The model that was exported.
        served: The `ServedModel` of the model.
        serve: The signature `serve` of the loaded version.
        tolerance: The largest difference that passes, relative to the largest output
            if that output exceeds 1. At least 1e-2 for a model with float16 or
            bfloat16 layers.

    Returns:
        Dict with `largest_difference`; `tolerance`; and `padding_counts_from`, the name
        of a layer that drops masks or reverses time, or `None`. With such a layer, all
        rows of the comparison have the same length.

    Raises:
        ExportMismatchError: If an output differs by more than the tolerance.
    """
    interface = served.interface
    rng = np.random.default_rng(1)
    fewest = shortest_timesteps(served.model, interface)
    lengths = np.array([9, 1, 6, 4], "int32") + fewest - 1
    if interface.batch_size is not None:
        lengths = np.resize(lengths, interface.batch_size)
    fixed = interface.timesteps[interface.sequences[0]]
    timesteps = lengths.max() if fixed is None else fixed
    destroyer = None
    if served.takes_lengths:
        destroyer = reverses_time(served.model) or destroys_masks(model)
    if fixed is not None or destroyer or not served.takes_lengths:
        lengths = np.full_like(lengths, timesteps)
    inputs = served.example_inputs(len(lengths), timesteps, rng)
    request = dict(inputs)
    if served.takes_lengths:
        for name in interface.sequences:
            request[name] = _with_nan_past(inputs[name], lengths)
        request[LENGTHS] = tf.constant(lengths)
    gaps = _gaps(model, served, inputs, lengths, serve(**request))
    if _half_precision(model):
        tolerance = max(tolerance, 1e-2)
    require_small(gaps, tolerance, "version")
    if destroyer and fixed is None:
        warnings.warn(
            f"Padding counts as frames past {destroyer!r}, which does not pass masks "
            "on: outputs depend on the amount of padding in a request.",
            stacklevel=2,
        )
    return {
        "largest_difference": max(gaps.values()),
        "tolerance": tolerance,
        "padding_counts_from": destroyer,
    }


def _with_nan_past(x, lengths):
    """Sets frames past the lengths to NaN; leaves integer sequences unchanged."""
    x = x.numpy()
    if x.dtype.kind == "f":
        x[np.arange(x.shape[1]) >= lengths[:, None]] = np.nan
    return tf.constant(x)


def _gaps(model, served, inputs, lengths, answers):
    """Returns the largest `gap` of each output to that of the rows alone, by name."""
    per_step = served.interface.per_step
    gaps = dict.fromkeys(per_step, 0.0)
    for row, length in enumerate(lengths):
        alone = answers_of(model, _alone(served, inputs, row, length))
        for (name, has_frames), y in zip(per_step.items(), alone, strict=True):
            found = answers[name].numpy()[row]
            if has_frames:
                found = found[:length]
            difference = gap(keras.ops.convert_to_numpy(y)[0], found)
            gaps[name] = float(np.maximum(gaps[name], difference))  # NaN stays
    return gaps


def _alone(served, inputs, row, length):
    """Returns one row of the inputs without padding, repeated to a fixed batch size."""
    interface = served.interface
    alone = {name: x[row : row + 1] for name, x in inputs.items()}
    if served.takes_lengths:
        alone |= {name: alone[name][:, :length] for name in interface.sequences}
    if interface.batch_size is not None:
        alone = {n: tf.repeat(x, interface.batch_size, 0) for n, x in alone.items()}
    return alone


def _half_precision(model):
    return any(
        getattr(layer, "compute_dtype", None) in ("float16", "bfloat16")
        for layer in sublayers(model)
    )
