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
    joined=None,
    compiled=False,
    wants_states=True,
):
    """Replaces `layer.inner_loop` at inference.

    Outputs at masked frames are unspecified: `masked_outputs` sets them.

    Args:
        layer: A `keras.layers.SimpleRNN`, `LSTM` or `GRU`.
        sequences: Tensor (B, T, D).
        states: List of tensors (B, U).
        mask: Boolean tensor (B, T), or `None`.
        lengths: int32 tensor (B,) within 0..T if `mask` is the mask of these lengths;
            otherwise `None`.
        joined: For an LSTM: kernel and recurrent kernel as one tensor, (D + U, 4U).
        compiled: Whether XLA compiles the loop. XLA has no `BlockLSTMV2`.
        wants_states: Whether the caller uses the returned states. If not, only the
            first state is correct.

    Returns:
        The output (B, U) at the last valid frame, outputs (B, T, U) in the order of
        processing, and the list of states.
    """
    recurrence = Recurrence(layer, sequences.dtype, joined)
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

    if layer.go_backwards and lengths is not None:
        # Keras reverses the padding as well, so the padding comes first.
        outputs = tf.reverse(_reversed_frames(outputs, lengths), [1])
    return states[0], outputs, states


def masked_outputs(layer, results, mask, lengths, of_lengths, zero_output, before):
    """Sets the outputs at masked frames as Keras does.

    With `lengths`, the last output of a row is the output at its last frame, which the
    model gives for this row alone. It does not depend on the padding of the batch.

    Args:
        layer: A `keras.layers.RNN`.
        results: The results of its loop: the output (B, ...) at the last valid frame,
            outputs (B, T, ...) in the order of processing, and the list of states.
            Outputs at frames that `mask` alone masks repeat the output before them.
        mask: Boolean tensor (B, T).
        lengths: int32 tensor (B,) within 0..T, whose padding is part of `mask`; `None`
            if all T frames belong to each row.
        of_lengths: Whether `mask` is the mask of `lengths`, without other masks.
        zero_output: Whether outputs at masked frames are zeros. If not, they repeat
            the output before them.
        before: Tensor (B, ...), the output at the last earlier frame of a stream;
            `None` at the start of sequences, where it is zeros.

    Returns:
        `results` with other outputs.
    """
    last, outputs, states = results
    zero = tf.zeros([], last.dtype)
    first = zero if before is None else before
    last = _where(tf.reduce_any(mask, 1), last, first)
    processed = tf.reverse(mask, [1]) if layer.go_backwards else mask
    fill = zero
    if zero_output:
        shown = processed
        frames = tf.shape(mask)[1]
        # Read backwards, the last frame of a row is its first, whatever its length.
        end = frames if lengths is None or layer.go_backwards else lengths[:, None]
        shows_last = tf.reduce_any(shown & (tf.range(frames) == end - 1), 1)
        if before is not None and lengths is not None:
            shows_last |= lengths == 0
        last = _where(shows_last, last, zero)
    elif of_lengths and not layer.go_backwards:
        shown, fill = mask, last[:, None]
    else:
        shown = tf.cumsum(tf.cast(processed, tf.int32), axis=1) > 0
        if before is not None:
            fill = before[:, None]
    if layer.return_sequences:
        outputs = _where(shown, outputs, fill)
    return last, outputs, states


def _where(condition, x, other):
    """`tf.where` by the first axes of `x`."""
    missing = len(x.shape) - len(condition.shape)
    return tf.where(condition[(..., *[None] * missing)], x, other)


def _reversed_frames(sequences, lengths):
    if lengths is None:
        return tf.reverse(sequences, [1])
    return tf.reverse_sequence(sequences, lengths, seq_axis=1)


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
