"""What several test modules share: layers by name, and weights that tell them apart."""

import contextlib
import resource
import threading

import keras
import numpy as np

from keras_bnrnn import backend, layers
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


def as_replicas(monkeypatch, *functions):
    """Calls each function as one of several replicas, in a thread of its own.

    `backend.sum_over_replicas` sums over the threads. A process has one logical CPU, so
    real replicas need a process of their own.

    Returns:
        The list of what the functions returned.
    """
    count = len(functions)
    barrier = threading.Barrier(count, timeout=30)
    terms, results, errors = [None] * count, [None] * count, []
    local = threading.local()

    def sum_over_replicas(x):
        terms[local.index] = x
        barrier.wait()
        total = sum(terms)
        barrier.wait()
        return total

    def call(index):
        local.index = index
        try:
            results[index] = functions[index]()
        except Exception as error:
            errors.append(error)
            barrier.abort()

    monkeypatch.setattr(backend, "replica_count", lambda: count)
    monkeypatch.setattr(backend, "sum_over_replicas", sum_over_replicas)
    threads = [threading.Thread(target=call, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
