"""Makes the signatures of a served model: `serve`, `step`, `chunk`, `initial_state`."""

import tensorflow as tf

from keras_bnrnn.export.names import LENGTHS, TIME
from keras_bnrnn.export.shapes import require_shapes


def serve_function(served):
    """Makes `serve`, which computes the outputs for whole sequences."""
    interface = served.interface
    specs = list(interface.specs().values())
    if served.takes_lengths:
        specs.append(tf.TensorSpec([interface.batch_size], tf.int32, name=LENGTHS))

    @tf.function(autograph=False, input_signature=specs)
    def serve(*tensors):
        *inputs, lengths = tensors if served.takes_lengths else (*tensors, None)
        return served.predict(dict(zip(interface.inputs, inputs, strict=True)), lengths)

    return serve


def step_function(served):
    """Makes `step`, which computes outputs and states for one frame of each row.

    The `predict` of the `ServedModel` must have been traced.
    """
    interface = served.interface
    inputs = interface.specs(one_frame=True)
    others = _state_specs(served)
    specs = {**inputs, **others}
    shapes = {**interface.shapes(one_frame=True), **_state_shapes(served)}

    @tf.function(autograph=False, input_signature=list(specs.values()))
    def step(*tensors):
        tensors = require_shapes(dict(zip(specs, tensors, strict=True)), shapes)
        frame, states = _split(tensors, inputs, others)
        t = states.pop(TIME)
        sequences = {
            name: x[:, None] if name in interface.sequences else x
            for name, x in frame.items()
        }
        outputs, states = served.advance(sequences, None, states)
        outputs = {
            name: y[:, 0] if interface.per_step[name] else y
            for name, y in outputs.items()
        }
        return {**outputs, **states, TIME: t + 1}

    return step


def chunk_function(served):
    """Makes `chunk`, which computes outputs and states for the next frames of each row.

    A row may have any number of new frames, or none. The `predict` of the `ServedModel`
    must have been traced.
    """
    interface = served.interface
    inputs = interface.specs()
    lengths_spec = {
        LENGTHS: tf.TensorSpec([interface.batch_size], tf.int32, name=LENGTHS)
    }
    others = _state_specs(served)
    specs = {**inputs, **lengths_spec, **others}
    shapes = {
        **interface.shapes(),
        LENGTHS: [interface.rows],
        **_state_shapes(served),
    }

    @tf.function(autograph=False, input_signature=list(specs.values()))
    def chunk(*tensors):
        tensors = require_shapes(dict(zip(specs, tensors, strict=True)), shapes)
        frames, states = _split(tensors, inputs, others)
        t, lengths = states.pop(TIME), tensors[LENGTHS]
        outputs, states = served.advance(frames, lengths, states)
        timesteps = tf.shape(frames[interface.sequences[0]])[1]
        valid = tf.clip_by_value(lengths, 0, timesteps)
        return {**outputs, **states, TIME: t + valid, LENGTHS: valid}

    return chunk


def initial_state_function(served):
    """Makes `initial_state`, which returns the states at the start of a sequence.

    `initial_state` takes any tensor (B, ...), such as the first frame, and reads its
    batch size.
    """
    interface = served.interface
    first = interface.sequences[0]
    spec = tf.TensorSpec(None, interface.inputs[first].dtype, name=first)
    shapes = {first: [interface.rows, ...]}

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
    interface = served.interface
    rows = interface.batch_size
    specs = {
        state.name: tf.TensorSpec([rows, *state.shape], tf.float32, name=state.name)
        for state in served.state_specs
    }
    return {**specs, TIME: tf.TensorSpec([rows], tf.int32, name=TIME)}


def _state_shapes(served):
    interface = served.interface
    rows = interface.rows
    shapes = {state.name: [rows, *state.shape] for state in served.state_specs}
    return {**shapes, TIME: [rows]}


def _split(tensors, *parts):
    """Splits a dict of tensors into one dict for the names in each of `parts`."""
    return [{name: tensors[name] for name in part} for part in parts]
