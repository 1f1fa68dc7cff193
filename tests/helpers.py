"""What several test modules share: layers by name, and weights that tell them apart."""

import contextlib
import resource

import keras
import numpy as np

from keras_bnrnn import layers
from keras_bnrnn.traversal import sublayers

# Each kind: its layer, and the stock layer of the same equations.
KINDS = {kind: (layer, layer.stock_layer) for kind, layer in layers.KINDS.items()}


# The installed version of Keras, such as (3, 15).
KERAS = tuple(int(number) for number in keras.__version__.split(".")[:2])


def randomize(layer, rng):
    """Gives every weight random, distinct values; variances positive ones."""
    for w in layer.weights:
        name = w.path.rsplit("/", 1)[-1]
        value = rng.normal(0.0, 0.5, w.shape)
        if name == "moving_variance":
            value = rng.uniform(0.3, 3.0, w.shape)
        elif name == "gamma":
            value = rng.uniform(0.5, 1.5, w.shape)
        elif name == "update_count":
            value = np.float32(7)
        w.assign(value)


def randomize_model(model, rng):
    """`randomize` for every layer of a model, whatever it is nested in."""
    for layer in sublayers(model):
        if not isinstance(layer, keras.Model):
            randomize(layer, rng)


def oracle_weights(layer):
    """The weights of a `BN...` layer as the dict that `oracle.py` takes."""
    cell, norm = layer.cell, layer.cell.input_norm
    weights = {
        "kernel": cell.kernel,
        "recurrent_kernel": cell.recurrent_kernel,
        "gamma": norm.gamma,
        "beta": norm.beta,
        "moving_mean": norm.moving_mean,
        "moving_variance": norm.moving_variance,
    }
    if getattr(cell, "recurrent_bias", None) is not None:
        weights["recurrent_bias"] = cell.recurrent_bias
    if getattr(cell, "peephole", False):
        weights["peephole"] = cell.peephole_kernel
    return {
        k: keras.ops.convert_to_numpy(w).astype("float64") for k, w in weights.items()
    }


def random_mask(rng, batch, timesteps):
    """Any pattern, with a row of no valid frame, one of a single one, a full one."""
    mask = rng.random((batch, timesteps)) < 0.6
    mask[0], mask[1], mask[2] = False, False, True
    mask[1, timesteps // 2] = True
    return mask


def gap(a, b):
    """The largest absolute difference, 0 of empty arrays."""
    differences = np.abs(np.asarray(a, "float64") - np.asarray(b, "float64"))
    return float(np.max(differences, initial=0.0))


@contextlib.contextmanager
def bounded_memory(megabytes):
    """Fails if the peak memory of the process grows by more than `megabytes`."""

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = peak()
    yield
    assert peak() - before < megabytes
