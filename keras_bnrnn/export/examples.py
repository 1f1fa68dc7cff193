"""Draws random inputs to trace and check an exported model."""

import keras
import numpy as np
import tensorflow as tf

from keras_bnrnn.export.comparison import answers_of
from keras_bnrnn.traversal import sublayers


def example_inputs(model, interface, rows, timesteps, rng):
    """Draws random inputs of the shapes and dtypes that a model takes.

    Integer inputs are below the `input_dim` of every `Embedding`, or below 2 if the
    model has no `Embedding`. If a layer masks frames by their value, about a quarter of
    the frames have this value, but never the first frame of a row: the mean over a row
    without a valid frame is NaN.

    Args:
        model: A Sequential or Functional model.
        interface: `Interface` of the model.
        rows: Int, the batch size.
        timesteps: Int, the T of sequences whose T is free.
        rng: `numpy.random.Generator`.

    Returns:
        Dict from the name of each input to a tensor.
    """
    parts = sublayers(model)
    sizes = [x.input_dim for x in parts if isinstance(x, keras.layers.Embedding)]
    masking = [x.mask_value for x in parts if isinstance(x, keras.layers.Masking)]
    masks_zero = any(getattr(x, "mask_zero", False) for x in parts)
    examples = {}
    for name, x in interface.inputs.items():
        shape = [rows, *(1 if size is None else size for size in x.shape[1:])]
        if name in interface.sequences and x.shape[1] is None:
            shape[1] = timesteps
        dtype = tf.as_dtype(x.dtype)
        if dtype.is_floating:
            value = rng.normal(size=shape)
        elif dtype == tf.string:
            value = np.full(shape, "a")
        elif dtype == tf.bool:
            value = rng.integers(0, 2, shape) == 1
        else:
            size = min(sizes, default=2)
            value = rng.integers(1 if masks_zero and size > 1 else 0, size, shape)
        if name in interface.sequences:
            if masking and dtype.is_floating and len(shape) > 2:
                value[_some(shape[:-1], rng)] = masking[0]
            elif masks_zero and dtype.is_integer:
                value[_some(shape, rng)] = 0
        examples[name] = tf.constant(value, dtype)
    return examples


def _some(shape, rng):
    """Draws a boolean array, true at about a quarter of the frames after the first."""
    some = rng.random(shape) < 0.25
    some[:, :1] = some[..., :1] = False
    return some


def shortest_timesteps(model, interface):
    """Returns the smallest T of 1, 16, 128, 1024 that a model accepts, or else 1."""
    rng = np.random.default_rng(0)
    rows = interface.batch_size or 1
    for timesteps in (1, 16, 128, 1024):
        inputs = example_inputs(model, interface, rows, timesteps, rng)
        try:
            answers_of(model, inputs)
        except (tf.errors.OpError, ValueError, ZeroDivisionError):
            continue  # convolutions and pooling need more timesteps
        return timesteps
    return 1
