"""Converts LSTM layers to LiteRT's operation `UNIDIRECTIONAL_SEQUENCE_LSTM`."""

import uuid

import keras
import numpy as np
import tensorflow as tf

# The limit for absolute values in a frame. A larger value could overflow to NaN in a
# product, and the frame that clears the state cannot clear NaN.
LARGEST = 1e18

# Closes a gate: sigmoid(-1e4) is 0, and float16 can represent -1e4.
CLOSED = -1e4


def run_fused(layer):
    """Makes an LSTM layer run as the fused operation if the outputs are the same."""
    own_loop = layer.inner_loop

    def inner_loop(sequences, initial_state, mask, training=False):
        if mask is not None or not _can_fuse(layer, sequences, initial_state):
            return own_loop(sequences, initial_state, mask, training)
        outputs = _fused_lstm(layer, sequences)
        return outputs[:, -1], outputs, initial_state

    layer.inner_loop = inner_loop


def _can_fuse(layer, sequences, initial_state):
    """Returns whether the fused operation can replace the loop of a layer."""
    starts = [tf.get_static_value(state) for state in initial_state]
    return (
        layer.activation is keras.activations.tanh
        and layer.recurrent_activation is keras.activations.sigmoid
        and not layer.return_state
        and sequences.shape[0] is not None
        and all(start is not None and not np.any(start) for start in starts)
    )


def _fused_lstm(layer, sequences):
    """Computes outputs (B, T, U) with a function that the converter recognises.

    The fused operation keeps its state between calls. An additional first frame
    therefore clears the state: it closes the gates i, f and o. An additional feature
    marks this frame: the feature is 1 in the first frame and 0 in all other frames.
    """
    cell, units = layer.cell, layer.units
    batch_size, _, features = sequences.shape
    frames = tf.reverse(sequences, [1]) if layer.go_backwards else sequences
    sound = tf.abs(frames) < LARGEST  # false for NaN as well
    frames = tf.where(sound, frames, 0.0)

    clearing = np.zeros((batch_size, 1, features + 1), "float32")
    clearing[..., -1] = 1.0
    frames = tf.pad(frames, [[0, 0], [0, 0], [0, 1]])
    frames = tf.concat([clearing, frames], axis=1)  # (B, 1 + T, D + 1)
    closing = np.full((1, 4 * units), CLOSED, "float32")  # i, f, c, o
    closing[:, 2 * units : 3 * units] = 0.0
    kernel = tf.concat([tf.convert_to_tensor(cell.kernel), closing], axis=0)

    zeros = tf.zeros([batch_size, units])
    bias = cell.bias if cell.use_bias else tf.zeros([4 * units])
    # Tensors, since the converter crashes the process if it meets variables here.
    _, outputs, *_ = _lstm_function()(
        frames,
        zeros,
        zeros,
        kernel,
        tf.convert_to_tensor(cell.recurrent_kernel),
        tf.convert_to_tensor(bias),
    )
    sound = tf.reduce_all(sound, axis=[1, 2], keepdims=True)
    return tf.where(sound, outputs[:, 1:], np.nan)


def _lstm_function():
    """Makes an LSTM function that the converter replaces by the fused operation.

    The function has the arguments and results of the LSTM of Keras 2. The converter
    recognises this function by its attribute `api_implements`.
    """
    attributes = {
        "api_implements": f"lstm_{uuid.uuid4().hex}",
        "time_major": False,
        "go_backwards": False,
    }

    @tf.function(experimental_attributes=attributes, autograph=False)
    def lstm(frames, h, c, kernel, recurrent_kernel, bias):
        def step(states, frame):
            h, c = states
            a = frame @ kernel + h @ recurrent_kernel + bias
            i, f, candidate, o = tf.split(a, 4, axis=-1)  # (B, U) each
            c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(candidate)
            return tf.sigmoid(o) * tf.tanh(c), c

        hs, cs = tf.scan(step, tf.transpose(frames, [1, 0, 2]), (h, c))
        return hs[-1], tf.transpose(hs, [1, 0, 2]), hs[-1], cs[-1], tf.zeros([])

    return lstm
