"""TensorFlow's LSTM operations, by blocks, against stock Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import gap

from keras_bnrnn.backend import block_lstm

BATCH, WIDTH, UNITS = 3, 4, 5


# Each two of the four at least once.
@pytest.mark.slow(
    but=[
        "length=1-1-sequences=0-known",
        "length=1-2-sequences=1-unknown",
        "length=1-8-sequences=2-known",
        "length=3-1-sequences=1-unknown",
        "length=3-2-sequences=2-known",
        "length=3-8-sequences=0-unknown",
        "length=100-1-sequences=2-unknown",
        "length=100-2-sequences=0-known",
        "length=100-8-sequences=1-known",
        "length=None-1-sequences=0-unknown",
        "length=None-2-sequences=1-known",
        "length=None-8-sequences=2-unknown",
    ]
)
@pytest.mark.parametrize("small", ["known", "unknown"])
@pytest.mark.parametrize("sequences", [0, 1, 2], ids="sequences={}".format)
@pytest.mark.parametrize("timesteps", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 3, 100, None], ids="length={}".format)
def test_states_and_gradients_are_those_of_keras(
    length, timesteps, sequences, small, rng
):
    """Blocks of one and of three timesteps, the last one shorter, and a single block.

    Without a length the gradient is one operation. The choice of it is known before the
    graph runs, or not. The gradients are taken twice, as from a persistent tape: the
    backward loop empties lists of the forward loop.
    The loss weighs the outputs, the cell states and both last states at random.
    """

    def draw(*shape):
        return tf.constant(rng.normal(size=shape), "float32")

    frames, h, c = draw(timesteps, BATCH, WIDTH), draw(BATCH, UNITS), draw(BATCH, UNITS)
    kernel = draw(WIDTH, 4 * UNITS)
    recurrent_kernel, bias = draw(UNITS, 4 * UNITS), draw(4 * UNITS)
    arguments = [frames, h, c, kernel, recurrent_kernel, bias]
    d_sequences = [draw(timesteps, BATCH, UNITS) for _ in range(sequences)]
    d_last = [draw(BATCH, UNITS), draw(BATCH, UNITS)]

    cell = keras.layers.LSTMCell(UNITS)
    cell.build((BATCH, WIDTH))
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        states, all_states, loss = [h, c], [], 0.0
        for t in range(timesteps):
            (_, states), _ = cell.stateless_call(
                [kernel, recurrent_kernel, bias],
                cell.non_trainable_variables,
                frames[t],
                states,
            )
            all_states.append(states)
            for state, d in zip(states, d_sequences, strict=False):
                loss += tf.reduce_sum(state * d[t])
        for state, d in zip(states, d_last, strict=True):
            loss += tf.reduce_sum(state * d)
    expected = tape.gradient(loss, arguments)

    @tf.function(autograph=False)
    def run(arguments, d_sequences, d_last, small):
        frames, h, c, kernel, recurrent_kernel, bias = arguments
        weights = kernel, recurrent_kernel
        blocks = length or 2, length is None if small is None else small
        stacked, last, kept = block_lstm.forward(
            frames, [h, c], *weights, bias, sequences, *blocks
        )
        gradients = [
            block_lstm.backward(
                frames, [h, c], *weights, kept, d_sequences, d_last, *blocks
            )
            for _ in range(2)
        ]
        return stacked, last, gradients

    in_graph = tf.constant(length is None) if small == "unknown" else None
    stacked, last, gradients = run(arguments, d_sequences, d_last, in_graph)
    assert len(stacked) == sequences
    for k, found in enumerate([*stacked, *last]):
        k, of_all = (k, True) if k < sequences else (k - sequences, False)
        wanted = [state[k] for state in all_states]
        wanted = np.stack(wanted) if of_all else wanted[-1]
        assert gap(found, wanted) <= 1e-6  # float32, states of at most 4
    for found, again, wanted in zip(*gradients, expected, strict=True):
        wanted = np.asarray(wanted)
        bound = 1e-5 * np.abs(wanted).max()  # float32, sums of at most 24 rows
        np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)
        np.testing.assert_array_equal(found, again)


@pytest.mark.parametrize("timesteps, length", [(1, 3), (5, 3), (1, None), (5, None)])
def test_a_slice_without_rows_has_no_turns(timesteps, length, rng):
    """One function for slices of 3 and of 0 rows, as of a batch of unknown size."""
    kernel = tf.constant(rng.normal(size=(WIDTH, 4 * UNITS)), "float32")
    recurrent_kernel = tf.constant(rng.normal(size=(UNITS, 4 * UNITS)), "float32")

    def results(frames, h, c, d_h, turns):
        arguments = frames, [h, c], kernel, recurrent_kernel
        blocks = length or 1, length is None, turns
        stacked, last, kept = block_lstm.forward(*arguments, None, 2, *blocks)
        d_last = [tf.zeros_like(h), tf.zeros_like(c)]
        gradients = block_lstm.backward(*arguments, kept, [d_h], d_last, *blocks)
        return stacked, last, gradients

    states = tf.TensorSpec((None, UNITS))
    counted = tf.function(
        results,
        input_signature=[
            tf.TensorSpec((timesteps, None, WIDTH)),
            states,
            states,
            tf.TensorSpec((timesteps, None, UNITS)),
            tf.TensorSpec((), tf.int32),
        ],
        autograph=False,
    )
    for rows in (BATCH, 0):
        shapes = [(timesteps, rows, WIDTH), *[(rows, UNITS)] * 2]
        shapes.append((timesteps, rows, UNITS))
        tensors = [tf.constant(rng.normal(size=s), "float32") for s in shapes]
        found = tf.nest.flatten(counted(*tensors, timesteps if rows else 0))
        assert [f.shape for f in found[:2]] == [(timesteps, rows, UNITS)] * 2
        assert [f.shape for f in found[2:4]] == shapes[1:3]
        assert [f.shape for f in found[4:7]] == shapes[:3]
        if rows == 0:
            assert all(gap(gradient, 0.0) == 0.0 for gradient in found)
            continue
        whole = tf.function(lambda *a: results(*a, None), autograph=False)
        for a, b in zip(found, tf.nest.flatten(whole(*tensors)), strict=True):
            assert gap(a, b) <= 1e-6 * max(1.0, np.abs(b).max())  # float32
