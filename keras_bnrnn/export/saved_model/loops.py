"""Runs recurrent layers in the exported graph, for inference on CPUs.

An LSTM with one row runs TensorFlow's `BlockLSTMV2`, one operation for all timesteps.
All other cases run the loop of `recurrence.py`. A loop uses one core, so a large batch
runs as two slices in parallel, on two cores.
"""

import keras
import tensorflow as tf

from keras_bnrnn.export.saved_model.recurrence import Recurrence
from keras_bnrnn.layers.activations import elementwise

# Times on 2 cores with T = 50, relative to Keras' loop. 128 units and one row: 0.75 for
# the loop of `recurrence.py`, 0.5 for BlockLSTMV2. 32 rows: 1.05 for one loop, 0.75 for
# two slices. BlockLSTMV2 with several rows: 0.6 to 2.7, whether or not its products are
# split over the cores. Below 8 rows, slices cost more time than they save. More slices
# than cores save no time.
SLICED_FROM = 8
SLICES = 2


def has_served_loop(layer):
    """Returns whether `served_loop` supports a recurrent layer."""
    stock = (keras.layers.SimpleRNN, keras.layers.LSTM, keras.layers.GRU)
    if type(layer) not in stock:
        return False
    gate = getattr(layer, "recurrent_activation", layer.activation)
    return elementwise(layer.activation, gate)


def joins_kernels(layer):
    """Returns whether `served_loop` takes `joined` weights for a layer."""
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
    """Replaces `layer.inner_loop` at inference.

    With `lengths`, the last output of a row is the output of its last valid frame, even
    with `zero_output_for_mask`. The outputs of a row therefore do not depend on the
    padding of the batch.

    Args:
        layer: A `keras.layers.SimpleRNN`, `LSTM` or `GRU`.
        sequences: Tensor (B, T, D).
        states: List of tensors (B, U).
        mask: Boolean tensor (B, T), or `None`.
        lengths: int32 tensor (B,) if `mask` is the mask of these lengths; otherwise
            `None`.
        continues: Whether `states` are the states after earlier frames. If so, the
            output before the first valid frame is the output of the last earlier
            frame instead of zeros.
        joined: For an LSTM: kernel and recurrent kernel as one tensor, (D + U, 4U).
        compiled: Whether XLA compiles the loop. XLA has no `BlockLSTMV2`.
        wants_states: Whether the caller uses the returned states. If not, only the
            first state is correct.

    Returns:
        The last output (B, U), outputs (B, T, U) in the order of processing, and the
        list of states.
    """
    recurrence = Recurrence(layer, sequences.dtype, joined)
    if lengths is not None:
        lengths = tf.clip_by_value(lengths, 0, tf.shape(sequences)[1])
    if layer.go_backwards:
        # With lengths, only the valid frames are reversed, so padding stays at the end.
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
        # Keras reverses the padding as well, so the padding comes first.
        outputs = tf.reverse(_reversed_frames(outputs, lengths), [1])
    return last, outputs, states


def _reversed_frames(sequences, lengths):
    if lengths is None:
        return tf.reverse(sequences, [1])
    return tf.reverse_sequence(sequences, lengths, seq_axis=1)


def _shown(layer, mask, lengths, continues):
    """Returns masks of the outputs (B, T, 1) and last outputs (B, 1) to keep.

    Other outputs become zeros or, past the lengths, repeat the last output.
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
    """Runs a function on slices of the batch in parallel.

    Args:
        function: Takes a slice (b, ...) of each of `rows`. Returns a list: outputs
            (b, T, U) and states (b, U), in the dtype of the sequences.
        rows: List: sequences (B, T, D); a mask or lengths (B, ...), or `None`; and
            states (B, U).

    Returns:
        The list that `function` returns, for the whole batch.
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
