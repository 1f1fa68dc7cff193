"""Stores weights of a served model as joined kernels and as float16."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from keras_bnrnn.export.saved_model.loops import joins_kernels
from keras_bnrnn.traversal import sublayers


class ServedWeights:
    """The variables of a served graph that replace weights of its Keras layers.

    Attributes:
        joined: Dict from the id of an LSTM layer to a variable (D + U, 4U), which holds
            the kernel above the recurrent kernel.
    """

    def __init__(self):
        self.joined = {}
        self._halves = {}  # id of a weight -> the weight, and its float16 variable

    def join_kernels(self, model):
        """Creates the joined variables of a model's LSTM layers."""
        for layer in sublayers(model):
            if joins_kernels(layer) and layer.built:
                self.joined[id(layer)] = tf.Variable(
                    _both_kernels(layer), trainable=False, name=layer.name
                )

    def set(self, model, weights):
        """Sets the weights of a model from arrays in the order of `model.weights`."""
        model.set_weights(weights)
        for layer in sublayers(model):
            if id(layer) in self.joined:
                self.joined[id(layer)].assign(_both_kernels(layer))

    def half(self, weight):
        """Returns the float16 variable of a weight, or `None`."""
        _, half = self._halves.get(id(weight), (None, None))
        return half

    def store_halves(self, model, indices):
        """Stores weights of a model as float16.

        Args:
            model: The model. The weights at `indices` hold values rounded to float16.
            indices: The indices of these weights in `model.weights`.
        """
        for i in indices:
            variable = model.weights[i]
            half = keras.ops.convert_to_numpy(variable).astype("float16")
            half = tf.Variable(half, name=variable.name)
            self._halves[id(variable)] = (variable, half)
        for layer in sublayers(model):
            if id(layer) in self.joined:
                kernels = [layer.cell.kernel, layer.cell.recurrent_kernel]
                if all(id(kernel) in self._halves for kernel in kernels):
                    both = _both_kernels(layer).astype("float16")
                    self.joined[id(layer)] = tf.Variable(both, name=layer.name)
                    for kernel in kernels:
                        del self._halves[id(kernel)]

    def in_use(self):
        """Returns a context in which Keras layers use the float16 variables."""
        if not self._halves:
            return contextlib.nullcontext()
        return keras.StatelessScope(
            [
                (variable, tf.cast(half, variable.dtype))
                for variable, half in self._halves.values()
            ]
        )


def halve_weights(served, tolerance=1e-3):
    """Stores weights as float16 if rounding them changes the outputs little.

    Functions that are already traced still read the float32 weights.

    Args:
        served: `ServedModel`.
        tolerance: The largest change that rounding one weight may make to the outputs
            on random sequences, relative to the largest output.

    Returns:
        Dict from `"float16"` and `"float32"` to the names of the weights stored so.
    """
    weights = served.model.get_weights()
    halves = _small_changes(served, weights, tolerance)
    served.set_weights([halves.get(i, weight) for i, weight in enumerate(weights)])
    served.weights.store_halves(served.model, halves)
    names = [v.path for v in served.model.weights]
    return {
        "float16": [names[i] for i in halves],
        "float32": [name for i, name in enumerate(names) if i not in halves],
    }


def _small_changes(served, weights, tolerance):
    """Finds the weights whose rounding to float16 changes the outputs little.

    Returns:
        Dict from the index of each such weight to its rounded values, as float32.
    """
    inputs = served.example_inputs(2, 8, np.random.default_rng(2))
    predict = tf.function(served.predict, autograph=False)

    def outputs(weights):
        served.set_weights(weights)
        answers = predict(inputs, None)
        return [y.numpy() for y in answers.values() if y.dtype.is_floating]

    expected = outputs(weights)
    halves = {}
    for i, variable in enumerate(served.model.weights):
        dtype = keras.backend.standardize_dtype(variable.dtype)
        if len(variable.shape) < 2 or dtype != "float32":
            continue
        with np.errstate(over="ignore"):
            half = weights[i].astype("float16").astype("float32")
        found = outputs([*weights[:i], half, *weights[i + 1 :]])
        changes = [
            np.abs(a - b).max(initial=0.0) / max(np.abs(a).max(initial=0.0), 1e-9)
            for a, b in zip(expected, found, strict=True)
        ]
        if np.max(changes, initial=0.0) <= tolerance:
            halves[i] = half
    return halves


def _both_kernels(layer):
    kernels = [layer.cell.kernel, layer.cell.recurrent_kernel]
    return np.concatenate([keras.ops.convert_to_numpy(k) for k in kernels])
