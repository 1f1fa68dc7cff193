"""The signatures of a served model: whole sequences, a frame, a chunk, first states."""

import keras
import numpy as np
import tensorflow as tf

from keras_bnrnn.export.served_model import LENGTHS, TIME
from keras_bnrnn.export.shapes import require_shapes
from keras_bnrnn.traversal import sublayers


def serve_function(served):
    """`serving_default`: whole sequences, and their lengths if so, to outputs."""
    specs = list(served.specs().values())
    if served.takes_lengths:
        specs.append(tf.TensorSpec([served.batch_size], tf.int32, name=LENGTHS))

    @tf.function(autograph=False, input_signature=specs)
    def serve(*tensors):
        *inputs, lengths = tensors if served.takes_lengths else (*tensors, None)
        return served.predict(dict(zip(served.inputs, inputs, strict=True)), lengths)

    return serve


def step_function(served):
    """`step`: the next frame of each sequence, and what its layers remember.

    Needs a `served` whose `predict` was traced.
    """
    inputs = served.specs(one_frame=True)
    others = _state_specs(served)
    specs = {**inputs, **others}
    shapes = {**served.shapes(one_frame=True), **_state_shapes(served)}

    @tf.function(autograph=False, input_signature=list(specs.values()))
    def step(*tensors):
        tensors = require_shapes(dict(zip(specs, tensors, strict=True)), shapes)
        frame, states = _split(tensors, inputs, others)
        t = states.pop(TIME)
        sequences = {
            name: x[:, None] if name in served.sequences else x
            for name, x in frame.items()
        }
        outputs, states = served.advance(sequences, None, states)
        per_step = dict(zip(served.outputs, served.per_step, strict=True))
        outputs = {n: y[:, 0] if per_step[n] else y for n, y in outputs.items()}
        return {**outputs, **states, TIME: t + 1}

    return step


def chunk_function(served):
    """`chunk`: the next frames of each sequence, some or none of each row.

    Needs a `served` whose `predict` was traced.
    """
    inputs = served.specs()
    lengths_spec = {LENGTHS: tf.TensorSpec([served.batch_size], tf.int32, name=LENGTHS)}
    others = _state_specs(served)
    specs = {**inputs, **lengths_spec, **others}
    shapes = {**served.shapes(), LENGTHS: [served.rows], **_state_shapes(served)}

    @tf.function(autograph=False, input_signature=list(specs.values()))
    def chunk(*tensors):
        tensors = require_shapes(dict(zip(specs, tensors, strict=True)), shapes)
        frames, states = _split(tensors, inputs, others)
        t, lengths = states.pop(TIME), tensors[LENGTHS]
        outputs, states = served.advance(frames, lengths, states)
        timesteps = tf.shape(frames[served.sequences[0]])[1]
        valid = tf.clip_by_value(lengths, 0, timesteps)
        return {**outputs, **states, TIME: t + valid, LENGTHS: valid}

    return chunk


def initial_state_function(served):
    """`initial_state`: the states that a sequence starts from.

    Takes any tensor (B, ...), such as the first frame, for its batch size.
    """
    first = served.sequences[0]
    spec = tf.TensorSpec(None, served.inputs[first].dtype, name=first)
    shapes = {first: [served.rows, ...]}

    @tf.function(autograph=False, input_signature=[spec])
    def initial_state(x):
        x = require_shapes({first: x}, shapes)[first]
        batch_size = tf.shape(x)[0]
        return {
            **served.states(batch_size),
            TIME: tf.zeros([batch_size], tf.int32),
        }

    return initial_state


def _state_specs(served):
    rows = served.batch_size
    specs = {
        state.name: tf.TensorSpec([rows, *state.shape], tf.float32, name=state.name)
        for state in served.state_specs
    }
    return {**specs, TIME: tf.TensorSpec([rows], tf.int32, name=TIME)}


def _state_shapes(served):
    rows = served.rows
    shapes = {state.name: [rows, *state.shape] for state in served.state_specs}
    return {**shapes, TIME: [rows]}


def _split(tensors, *parts):
    """Splits a dict of tensors into one for the names of each part."""
    return [{name: tensors[name] for name in part} for part in parts]


def why_not_causal(served, serve, step):
    """Why frames cannot come one after another, or `None` where they can.

    Tries it: with random weights, so that none that is 0 hides a path, the outputs of
    a whole sequence must be those of its frames one by one. A layer that looks ahead,
    or back by other means than its states, gives others.

    Args:
        served: `ServedModel`.
        serve: Its traced `serve_function`.
        step: Its `step_function`; traced here.
    """
    x = served.inputs[served.sequences[0]]
    if any(served.inputs[name].shape[1] is not None for name in served.sequences):
        return f"the number of timesteps is fixed: {x.name!r} has the shape {x.shape}"
    for layer in sublayers(served.model):
        if isinstance(layer, keras.layers.Bidirectional):
            return f"{layer.name!r} reads sequences from both ends"
        if getattr(layer, "go_backwards", False):
            return f"{layer.name!r} reads sequences from their end"
    weights = served.model.get_weights()
    rng = np.random.default_rng(0)
    try:
        served.set_weights([_random_weight(v, rng) for v in served.model.weights])
        gap = _gap_of_steps(served, serve, step, rng)
    except (tf.errors.OpError, ValueError, TypeError) as error:
        return f"its frames cannot come one by one: {error}"
    finally:
        served.set_weights(weights)
    if not gap <= _tolerance(served.model):
        return (
            "a layer other than a recurrent one looks at several timesteps: frames one "
            f"by one give other outputs than the whole sequence, by up to {gap:.1g}"
        )
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
    """The largest difference, relative to the largest output where that exceeds 1."""
    rows, timesteps = served.batch_size or 2, 4
    inputs = served.example_inputs(rows, timesteps, rng)
    whole = _call(serve, served, inputs, timesteps)
    states = served.states(rows) | {TIME: tf.zeros([rows], tf.int32)}
    largest = 0.0
    for t in range(timesteps):
        frame = _cut(served, inputs, t)
        answer = dict(step(*frame.values(), *states.values()))
        states = {name: answer[name] for name in states}
        prefix = _cut(served, inputs, slice(0, t + 1))
        until_now = _call(serve, served, prefix, t + 1)
        for name, per_step in zip(served.outputs, served.per_step, strict=True):
            expected = whole[name][:, t] if per_step else until_now[name]
            expected, found = (np.asarray(y) for y in (expected, answer[name]))
            if expected.dtype.kind == "f":
                scale = max(1.0, np.abs(expected).max(initial=0.0))
                gap = np.abs(expected - found).max(initial=0.0) / scale
            else:
                gap = float(np.any(expected != found))
            largest = np.maximum(largest, gap)  # NaN stays
    return float(largest)


def _cut(served, inputs, where):
    return {n: x[:, where] if n in served.sequences else x for n, x in inputs.items()}


def _call(serve, served, inputs, timesteps):
    rows = len(next(iter(inputs.values())))
    lengths = [tf.fill([rows], timesteps)] if served.takes_lengths else []
    return serve(*inputs.values(), *lengths)
