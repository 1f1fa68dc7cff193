"""Runs recurrent layers in the exported graph: for inference, on CPUs, without XLA.

One row of an LSTM runs TensorFlow's `BlockLSTMV2`, one operation for all timesteps. All
else runs the loop of `recurrence.py`. Many rows run in two slices of the batch side by
side: one recurrence uses one core, and two slices use two.
"""

import keras
import tensorflow as tf

from keras_bnrnn.export.saved_model.recurrence import Recurrence
from keras_bnrnn.layers.activations import elementwise

# Measured on 2 cores, relative to Keras' loop, T = 50: with 128 units and one row the
# loop takes 0.75 and BlockLSTMV2 0.5; with 32 rows one loop takes 1.05 and two slices
# 0.75. BlockLSTMV2 of several rows takes 0.6 to 2.7, whether its products are split
# over the cores or not. Below 8 rows slices cost more time than they save; more slices
# than cores save nothing.
SLICED_FROM = 8
SLICES = 2


def has_served_loop(layer):
    """Whether `served_loop` knows the equations of a recurrent layer."""
    stock = (keras.layers.SimpleRNN, keras.layers.LSTM, keras.layers.GRU)
    if type(layer) not in stock:
        return False
    gate = getattr(layer, "recurrent_activation", layer.activation)
    return elementwise(layer.activation, gate)


def joins_kernels(layer):
    """Whether `served_loop` takes `joined` weights for a layer."""
    return type(layer) is keras.layers.LSTM and has_served_loop(layer)


def served_loop(
    layer,
    sequences,
    states,
    mask,
    lengths=None,
    continues=False,
    joined=None,
    compiled=False,
    wants_states=True,
):
    """Returns what `layer.inner_loop` returns at inference.

    If the mask is that of lengths, the last output is that of the last valid frame,
    even with `zero_output_for_mask`: a row answers as if it were alone.

    Args:
        layer: A `keras.layers.SimpleRNN`, `LSTM` or `GRU`.
        sequences: Tensor (B, T, D).
        states: List of tensors (B, U).
        mask: Boolean tensor (B, T), or `None`.
        lengths: int32 tensor (B,), if the mask is that of lengths and nothing else.
        continues: Whether the states come from earlier frames. Before the first valid
            frame the output is then the last output, not zeros.
        joined: For an LSTM: kernel and recurrent kernel as one tensor, (D + U, 4U).
        compiled: Whether XLA compiles the loop. XLA has no `BlockLSTMV2`.
        wants_states: Whether the caller uses the states. If not, only the first is
            right.

    Returns:
        The last output (B, U), outputs (B, T, U) in the order of processing, and the
        list of states.
    """
    recurrence = Recurrence(layer, sequences.dtype, joined)
    if lengths is not None:
        lengths = tf.clip_by_value(lengths, 0, tf.shape(sequences)[1])
    if layer.go_backwards:
        # With lengths: padding stays behind, where nothing needs to step over it.
        sequences = _reversed_frames(sequences, lengths)
        if mask is not None and lengths is None:
            mask = tf.reverse(mask, [1])

    if sequences.shape[1] == 1:
        states = recurrence.one_step(sequences[:, 0], list(states), mask)
        outputs = states[0][:, None]
    else:
        rows = [sequences, mask if lengths is None else lengths, *states]

        def run(frames, valid, *states):
            of_lengths = lengths is not None
            return recurrence.run(
                frames,
                list(states),
                mask=None if of_lengths else valid,
                lengths=valid if of_lengths else None,
                wants_states=wants_states,
            )

        if compiled:
            outputs, *states = run(*rows)
        elif recurrence.has_block and (mask is None or lengths is not None):
            outputs, *states = tf.cond(
                tf.shape(sequences)[0] == 1,
                lambda: recurrence.block(sequences, list(states), lengths),
                lambda: _in_slices(run, rows),
            )
        else:
            outputs, *states = _in_slices(run, rows)

    if mask is None:
        return states[0], outputs, states
    shown, last_shown = _shown(layer, mask, lengths, continues)
    zero = tf.zeros([], outputs.dtype)
    last = tf.where(last_shown, states[0], zero)
    if lengths is not None and not layer.zero_output_for_mask:
        repeated = tf.zeros_like(last) if layer.go_backwards else last
        outputs = tf.where(shown, outputs, repeated[:, None])
    else:
        outputs = tf.where(shown, outputs, zero)
    if layer.go_backwards and lengths is not None:
        # Keras reverses padding as well: it comes first.
        outputs = tf.reverse(_reversed_frames(outputs, lengths), [1])
    return last, outputs, states


def _reversed_frames(sequences, lengths):
    if lengths is None:
        return tf.reverse(sequences, [1])
    return tf.reverse_sequence(sequences, lengths, seq_axis=1)


def _shown(layer, mask, lengths, continues):
    """The outputs to keep, (B, T, 1), and the last outputs to keep, (B, 1).

    The others become zeros or, past the lengths, repeat the last one.
    """
    if lengths is not None:
        shown = tf.sequence_mask(lengths, tf.shape(mask)[1])
        last = tf.ones_like(lengths, tf.bool) if continues else lengths > 0
        return shown[..., None], last[:, None]
    if layer.zero_output_for_mask:
        shown = mask
    elif continues:
        shown = tf.ones_like(mask)
    else:
        shown = tf.cumsum(tf.cast(mask, tf.int32), axis=1) > 0
    return shown[..., None], shown[:, -1:]


def _in_slices(function, rows):
    """Runs a function on slices of the batch, side by side.

    Args:
        function: Takes tensors (b, ...), or `None`, and returns a list of tensors
            (b, T, U) and (b, U), of the first one's dtype.
        rows: List of tensors (B, ...), or `None`; the last of them are states.
    """
    sequences, _, *states = rows
    if sequences.shape[0] == 1:
        return function(*rows)
    batch_size = tf.shape(sequences)[0]
    count = tf.where(batch_size < SLICED_FROM, 1, SLICES)
    size = -(-batch_size // count)

    def body(i, arrays):
        part = [None if x is None else x[i * size : (i + 1) * size] for x in rows]
        results = function(*part)
        return i + 1, [a.write(i, y) for a, y in zip(arrays, results, strict=True)]

    width = states[0].shape[1]
    shapes = [[None, sequences.shape[1], width], *([None, x.shape[1]] for x in states)]
    arrays = [
        tf.TensorArray(
            sequences.dtype, size=count, element_shape=shape, infer_shape=False
        )
        for shape in shapes
    ]
    _, arrays = tf.while_loop(
        lambda i, _: i < count, body, (0, arrays), parallel_iterations=SLICES
    )
    return [array.concat() for array in arrays]
