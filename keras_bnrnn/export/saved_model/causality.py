"""Tests whether a model is causal: whether it can process frames one at a time."""

import keras
import numpy as np
import tensorflow as tf

from keras_bnrnn.export.comparison import gap
from keras_bnrnn.export.names import TIME
from keras_bnrnn.traversal import sublayers

# The number of draws of random weights. With one, a ReLU can be 0 at all frames, and
# hide what the layers before it do. Each takes a tenth of a second of an export of some
# four seconds.
DRAWS = 4


def why_not_causal(served, serve, step):
    """Returns why a model is not causal, or `None` if it is causal.

    Compares the outputs for whole sequences with the outputs for frames one at a time.
    They differ if a layer reads later frames, or reads earlier frames other than
    through its states. The comparison uses random weights, since a weight of 0 could
    hide such a layer.

    Args:
        served: `ServedModel`.
        serve: The `serve_function` of the model, already traced.
        step: The `step_function` of the model; this function traces it.

    Returns:
        str, the reason, or `None`.
    """
    interface = served.interface
    x = interface.inputs[interface.sequences[0]]
    if any(timesteps is not None for timesteps in interface.timesteps.values()):
        return f"the number of timesteps is fixed: {x.name!r} has the shape {x.shape}"
    for layer in sublayers(served.model):
        if isinstance(layer, keras.layers.Bidirectional):
            return f"{layer.name!r} reads sequences from both ends"
        if getattr(layer, "go_backwards", False):
            return f"{layer.name!r} reads sequences from their end"
    weights = served.model.get_weights()
    rng = np.random.default_rng(0)
    try:
        for _ in range(DRAWS):
            served.set_weights([_random_weight(v, rng) for v in served.model.weights])
            largest = _gap_of_steps(served, serve, step, rng)
            if not largest <= _tolerance(served.model):
                return (
                    "a layer other than a recurrent one looks at several timesteps: "
                    "outputs of single frames and whole sequences differ by up to "
                    f"{largest:.1g}"
                )
    except (tf.errors.OpError, ValueError, TypeError) as error:
        return f"the model cannot process single frames: {error}"
    finally:
        served.set_weights(weights)
    return None


def _random_weight(variable, rng):
    shape = tuple(variable.shape)
    if not keras.backend.is_float_dtype(variable.dtype):
        return keras.ops.convert_to_numpy(variable)
    if "variance" in variable.name:
        return rng.uniform(0.5, 1.5, shape)
    fan_in = shape[0] if len(shape) > 1 else 4
    return rng.normal(size=shape) / np.sqrt(fan_in)


def _tolerance(model):
    exact = all(
        getattr(layer, "compute_dtype", None) in (None, "float32", "float64")
        for layer in sublayers(model)
    )
    return 1e-3 if exact else 5e-2


def _gap_of_steps(served, serve, step, rng):
    """Returns the largest `gap` between step-by-step and whole-sequence outputs."""
    interface = served.interface
    rows, timesteps = interface.batch_size or 2, 4
    inputs = served.example_inputs(rows, timesteps, rng)
    whole = _call(serve, served, inputs, timesteps)
    states = served.states(rows) | {TIME: tf.zeros([rows], tf.int32)}
    gaps = [0.0]
    for t in range(timesteps):
        frame = _cut(interface, inputs, t)
        answer = dict(step(*frame.values(), *states.values()))
        states = {name: answer[name] for name in states}
        prefix = _cut(interface, inputs, slice(0, t + 1))
        until_now = _call(serve, served, prefix, t + 1)
        for name, per_step in interface.per_step.items():
            expected = whole[name][:, t] if per_step else until_now[name]
            gaps.append(gap(expected, answer[name]))
    return float(np.max(gaps))


def _cut(interface, inputs, where):
    sequences = interface.sequences
    return {name: x[:, where] if name in sequences else x for name, x in inputs.items()}


def _call(serve, served, inputs, timesteps):
    rows = len(next(iter(inputs.values())))
    lengths = [tf.fill([rows], timesteps)] if served.takes_lengths else []
    return serve(*inputs.values(), *lengths)
