"""Moving the padding changes nothing: outputs, states, statistics and gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import KINDS, gap, randomize

from keras_bnrnn import SequenceBatchNorm
from keras_bnrnn.frames import Frames

B, T, MORE, D, U = 6, 5, 9, 3, 4
BOOLEANS = [False, True]
LENGTHS = [3, 5, 1, 4, 2, 5]


def placed(rng, where):
    """Positions (B, MORE) of valid frames: the same lengths, with padding `where`."""
    if where == "right":
        return np.arange(MORE) < np.array(LENGTHS)[:, None]
    if where == "left":
        return placed(rng, "right")[:, ::-1]
    mask = np.zeros((B, MORE), bool)
    for row, length in zip(mask, LENGTHS, strict=True):
        row[rng.choice(MORE, length, replace=False)] = True
    return mask


def spread(frames, mask):
    """Rows of frames at the valid positions of a mask; NaN elsewhere."""
    x = np.full((*mask.shape, D), np.nan)
    for row, valid, own in zip(x, mask, frames, strict=True):
        row[valid] = own
    return x


def answers(layer, x, mask, upstream, training):
    """Outputs at valid frames, states, statistics, and gradients."""
    x = tf.constant(x)
    weights = layer.get_weights()
    reverse = getattr(layer, "go_backwards", False)
    of_outputs = mask[:, ::-1] if reverse else mask
    sources = [w.value for w in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(x)
        results = keras.tree.flatten(layer(x, mask=mask, training=training))
        outputs = tf.boolean_mask(results[0], of_outputs)
        loss = tf.reduce_sum(outputs * upstream[0])
        for state, weigh in zip(results[1:], upstream[1:], strict=False):
            loss += tf.reduce_sum(state * weigh)
    of_x, *gradients = tape.gradient(loss, [x, *sources])
    assert not np.asarray(of_x)[~mask].any()
    statistics = [w.numpy() for w in layer.non_trainable_variables]
    layer.set_weights(weights)
    return [outputs, *results[1:], np.asarray(of_x)[mask], *gradients, *statistics]


@pytest.mark.slow(
    but=[
        "simple_rnn-sequence-False-False",
        "lstm-frame-True-True",
        "gru-joint-False-False",
    ]
)
@pytest.mark.parametrize("training", BOOLEANS)
@pytest.mark.parametrize("backwards", BOOLEANS)
@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({}, 1e-6),
        ({"statistics": "frame"}, 1e-4),  # single rows are normalised
        ({"normalize": "joint"}, 1e-4),
    ],
    ids=["sequence", "frame", "joint"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_where_the_padding_is_changes_nothing(
    kind, options, tolerance, backwards, training, rng
):
    layer = KINDS[kind][0](
        U,
        go_backwards=backwards,
        return_sequences=True,
        return_state=True,
        dtype="float64",
        **options,
    )
    layer.build((None, None, D))
    randomize(layer, rng)
    frames = [rng.normal(size=(length, D)) for length in LENGTHS]
    upstream = [rng.normal(size=(sum(LENGTHS), U))]
    upstream += [rng.normal(size=(B, U)) for _ in range(2)]

    expected = None
    for where in ("right", "left", "gaps"):
        mask = placed(rng, where)
        found = answers(layer, spread(frames, mask), mask, upstream, training)
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            assert gap(a, b) <= tolerance
    # Without more padding than the longest row needs, and an empty row more.
    mask = placed(rng, "right")[:, :T]
    found = answers(layer, spread(frames, mask), mask, upstream, training)
    for a, b in zip(found, expected, strict=True):
        assert gap(a, b) <= tolerance


@pytest.mark.parametrize("statistics", ["sequence", "frame"])
def test_where_the_padding_is_changes_no_normalisation(statistics, rng):
    norm = SequenceBatchNorm(statistics=statistics, dtype="float64")
    norm.build((None, None, D))
    randomize(norm, rng)
    frames = [rng.normal(size=(length, D)) for length in LENGTHS]
    upstream = [rng.normal(size=(sum(LENGTHS), D))]
    expected = None
    for where in ("right", "left", "gaps"):
        mask = placed(rng, where)
        found = answers(norm, spread(frames, mask), mask, upstream, True)
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            assert gap(a, b) <= 1e-10


@pytest.mark.parametrize("time_major", BOOLEANS)
@pytest.mark.parametrize("backwards", BOOLEANS)
@pytest.mark.parametrize("repeat", BOOLEANS)
def test_frames_in_numpy(time_major, backwards, repeat, rng):
    mask = placed(rng, "gaps")
    mask[0] = False
    x = rng.normal(size=(B, MORE, D))
    x[~mask] = np.nan
    frames = Frames(tf.constant(mask), backwards, time_major)
    arranged = np.asarray(frames.arrange(tf.constant(x)))
    restored = np.asarray(frames.restore(tf.constant(arranged), repeat))
    if time_major:
        arranged = arranged.swapaxes(0, 1)
    for b in range(B):
        own = x[b, mask[b]]
        own = own[::-1] if backwards else own
        np.testing.assert_array_equal(arranged[b, : len(own)], own)
        assert not arranged[b, len(own) :].any()
        previous, seen = np.zeros(D), 0
        for t, valid in enumerate(mask[b, ::-1] if backwards else mask[b]):
            if valid:
                previous, seen = own[seen], seen + 1
            expected = previous if valid or repeat else np.zeros(D)
            assert gap(restored[b, t], expected) == 0
    assert list(frames.lengths) == list(mask.sum(1))


@pytest.mark.parametrize("jit", BOOLEANS)
@pytest.mark.parametrize("backwards", BOOLEANS)
def test_masked_outputs_that_repeat_pass_their_gradient_on(jit, backwards, rng):
    """A loss may look at masked positions, too."""
    mask = tf.constant(placed(rng, "gaps"))
    x = tf.constant(rng.normal(size=(MORE, B, D)))
    upstream = tf.constant(rng.normal(size=(B, MORE, D)))

    @tf.function(jit_compile=jit)
    def gradient(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = Frames(mask, backwards).restore(x, repeat=True)
            loss = tf.reduce_sum(y * upstream)
        return tape.gradient(loss, x)

    found = np.asarray(gradient(x, upstream))
    expected = np.zeros((MORE, B, D))
    for b, row in enumerate(np.asarray(mask)):
        t = -1
        for p, valid in enumerate(row[::-1] if backwards else row):
            t += int(valid)
            if t >= 0:
                expected[t, b] += upstream[b, p]
    assert gap(found, expected) <= 1e-12
    only_valid = np.asarray(mask)[:, ::-1] if backwards else np.asarray(mask)
    upstream = tf.where(only_valid[..., None], upstream, 0.0)
    for b, row in enumerate(only_valid):
        expected[:, b] = 0
        expected[: row.sum(), b] = np.asarray(upstream)[b, row]
    assert gap(gradient(x, upstream), expected) == 0


@pytest.mark.slow(but=["input-simple_rnn-relu", "input-gru-tanh", "joint-lstm-tanh"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["input", "joint"])
def test_what_overflows_past_the_end_of_a_row_reaches_nothing(
    kind, normalize, activation, rng
):
    """A recurrent kernel of 16 at each of 50 padded timesteps.

    Float32 ends at 16**32.
    """
    layer = KINDS[kind][0](
        U, activation=activation, normalize=normalize, return_sequences=True
    )
    if kind != "simple_rnn":
        layer = KINDS[kind][0](
            U,
            activation=activation,
            recurrent_activation=activation,
            normalize=normalize,
            return_sequences=True,
        )
    layer.build((None, 50, D))
    kernel = np.tile(16.0 * np.eye(U), layer.cell.gates)
    layer.cell.recurrent_kernel.assign(kernel)
    mask = np.arange(50) < np.array([[2], [3], [1]])
    x = tf.constant(rng.normal(size=(3, 50, D)), "float32")
    weights = [w.value for w in layer.trainable_variables]
    for training in BOOLEANS:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.boolean_mask(layer(x, mask=mask, training=training), mask)
            loss = tf.reduce_sum(tf.sin(y))
        for value in [y, *tape.gradient(loss, [x, *weights])]:
            assert np.isfinite(value).all()
