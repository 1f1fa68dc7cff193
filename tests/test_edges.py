"""Edges of Keras that users meet: masks in 3.16, dtypes, T = 0, legacy arguments."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import KINDS, gap, randomize, randomize_model

from keras_bnrnn import BNGRU, BNLSTM, SequenceBatchNorm, fold, recalibrate

B, T, D, U = 4, 6, 3, 4
EACH = pytest.mark.parametrize("kind", KINDS)


def frames(rng, *shape):
    return rng.normal(size=shape or (B, T, D)).astype("float32")


# Masks, where `keras.layers.RNN` no longer hands them on


@EACH
def test_masks_are_handed_on_whatever_the_base_class_does(kind, rng, monkeypatch):
    """Keras 3.16 sets `supports_masking = False` in `RNN.__init__`."""
    stock_init = keras.layers.RNN.__init__

    def init(self, *args, **kwargs):
        stock_init(self, *args, **kwargs)
        self.supports_masking = False

    monkeypatch.setattr(keras.layers.RNN, "__init__", init)
    make = KINDS[kind][0]
    model = keras.Sequential(
        [
            keras.Input((None, D)),
            keras.layers.Masking(),
            make(U, return_sequences=True),
            make(U),
        ]
    )
    randomize_model(model, rng)
    x = frames(rng)
    padded = np.concatenate([x, np.zeros((B, 3, D), "float32")], axis=1)
    for training in (False, True):
        assert gap(model(x, training=training), model(padded, training=training)) < 1e-5


# dtypes


@pytest.mark.parametrize("timesteps", [T, None])
@EACH
def test_float32_layer_in_time_distributed_of_a_mixed_policy(kind, timesteps, rng):
    """`TimeDistributed` calls `call` itself, and nothing casts."""
    make, stock = KINDS[kind]
    for inner in (make(U, dtype="float32"), stock(U, dtype="float32")):
        layer = keras.layers.TimeDistributed(inner, dtype="mixed_float16")
        x = keras.Input((2, timesteps, D), dtype="float16")
        model = keras.Model(x, layer(x))
        y = model(frames(rng, B, 2, T, D).astype("float16"))
        assert y.shape == (B, 2, U)
        assert np.all(np.isfinite(y))


@pytest.mark.parametrize("layer_class", [BNLSTM, BNGRU])
@pytest.mark.parametrize("implementation", [0, 1, 2])
def test_implementation_is_accepted_and_changes_nothing(
    layer_class, implementation, rng
):
    layer = layer_class(U, implementation=implementation)
    other = layer_class.from_config(layer.get_config())
    for each in (layer, other):
        each.build((None, T, D))
    randomize(layer, rng)
    other.set_weights(layer.get_weights())
    x = frames(rng)
    for training in (False, True):
        assert gap(layer(x, training=training), other(x, training=training)) == 0.0


# A mask of all axes but the features, as `Masking` makes it


def test_norm_takes_the_mask_that_masking_makes_on_rank_4(rng):
    x = frames(rng, B, T, 5, D)
    valid = rng.random((B, T, 5)) < 0.7
    x[~valid] = 0.0
    model = keras.Sequential(
        [keras.Input((T, 5, D)), keras.layers.Masking(), SequenceBatchNorm(name="norm")]
    )
    norm = model.get_layer("norm")
    y = np.asarray(model(x, training=True))
    values = x[valid].astype("float64")
    np.testing.assert_allclose(norm.moving_mean, values.mean(0), atol=1e-6)
    np.testing.assert_allclose(norm.moving_variance, values.var(0), rtol=1e-5)
    expected = (values - values.mean(0)) / np.sqrt(values.var(0) + norm.epsilon)
    np.testing.assert_allclose(y[valid], expected, atol=1e-5)

    other = frames(rng, B, T, 5, D) * 3.0 + 1.0
    other[~valid] = 0.0
    recalibrate(model, other, verbose=0)
    np.testing.assert_allclose(norm.moving_mean, other[valid].mean(0), atol=1e-6)


def test_frame_wise_norm_takes_it_too(rng):
    x = frames(rng, B, T, 5, D)
    valid = rng.random((B, T, 5)) < 0.7
    norm = SequenceBatchNorm(statistics="frame")
    y = np.asarray(norm(x, mask=valid, training=True))
    for t in range(T):
        values = x[:, t][valid[:, t]].astype("float64")
        expected = (values - values.mean(0)) / np.sqrt(values.var(0) + norm.epsilon)
        np.testing.assert_allclose(y[:, t][valid[:, t]], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(B, T, 4), (B,), (B, T, 5, D), (B, 2)])
def test_other_masks_are_refused(shape, rng):
    message = (
        r"`mask` must have the shape \(batch, timesteps\) = \(4, 6\) or "
        r"\(batch, timesteps, ...\) = \(4, 6, 5\).*Received: mask of shape "
    )
    with pytest.raises(ValueError, match=message):
        SequenceBatchNorm()(frames(rng, B, T, 5, D), mask=np.ones(shape, bool))


# No timesteps


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_batch_without_rows(kind, training, rng):
    """Neither the long turns of a loop nor the short ones may need rows."""
    layer = KINDS[kind][0](U, return_sequences=True)
    layer.build((None, None, D))
    spec = tf.TensorSpec((None, None, D))
    function = tf.function(
        lambda x: layer(x, training=training), input_signature=[spec], autograph=False
    )
    for timesteps in (1, 4, 7):
        assert function(tf.zeros((0, timesteps, D))).shape == (0, timesteps, U)


@pytest.mark.slow(but=["simple_rnn-False-False", "lstm-True-True", "gru-False-True"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
@EACH
def test_no_timesteps_are_refused_in_the_same_words(kind, sequences, training, rng):
    layer = KINDS[kind][0](U, return_sequences=sequences, name="layer")
    layer.build((None, None, D))
    before = layer.get_weights()
    empty = np.zeros((B, 0, D), "float32")

    def call(x):
        return layer(x, training=training)

    free = [tf.TensorSpec([None, None, D])]
    calls = [call, tf.function(call), tf.function(call, input_signature=free)]
    words = r"`sequences` must have at least one timestep.*layer \S*'layer"
    for function in calls:
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=words):
            function(tf.constant(empty))
    for a, b in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# How equal a folded model is


@pytest.mark.slow(but=["gru"])
@EACH
def test_folding_is_exact_to_what_float32_can_hold(kind, rng):
    """To 1e-5, and to float32's rounding of the largest term where means are large."""
    model = keras.Sequential(
        [keras.Input((T, D)), KINDS[kind][0](U, return_sequences=True)]
    )
    randomize_model(model, rng)
    for mean in (0.0, 1e2, 1e4):
        x = frames(rng) + np.float32(mean)
        recalibrate(model, x, verbose=0)
        folded = fold(model)
        assert gap(folded(x), model(x, training=False)) <= 1e-5 + 3e-7 * mean


def test_folding_leaves_the_model_compiled(rng, monkeypatch):
    """Not even for a moment: another thread may be using the model."""
    model = keras.Sequential([keras.Input((T, D)), BNLSTM(U), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    seen = []
    stock_clone = keras.models.clone_model

    def clone_model(*args, **kwargs):
        seen.append(model.compiled)
        return stock_clone(*args, **kwargs)

    monkeypatch.setattr(keras.models, "clone_model", clone_model)
    folded = fold(model)
    assert seen == [True] and model.compiled and folded.compiled


def test_a_folded_model_has_no_slots_until_it_trains(rng):
    model = keras.Sequential([keras.Input((T, D)), BNLSTM(U), keras.layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"], run_eagerly=True)
    x, y = frames(rng), np.zeros((B, 1))
    model.fit(x, y, verbose=0)
    folded = fold(model)
    assert len(folded.optimizer.variables) == 2 < len(model.optimizer.variables)
    answers = (m.evaluate(x, y, verbose=0) for m in (folded, model))
    for a, b in zip(*answers, strict=True):
        assert abs(a - b) <= 1e-5
    folded.fit(x, y, verbose=0)
    assert len(folded.optimizer.variables) > 2


def test_a_layer_shared_with_a_nested_model_is_folded_once(rng):
    shared = BNLSTM(D, return_sequences=True, name="shared")
    x = keras.Input((T, D))
    inner = keras.Model(x, shared(x), name="inner")
    y = keras.Input((T, D))
    model = keras.Model(y, inner(shared(y)))
    randomize_model(model, rng)
    folded, report = fold(model, return_report=True)
    assert len(report) == 1
    assert folded.get_layer("inner").get_layer("shared") is folded.get_layer("shared")
    z = frames(rng)
    assert gap(folded(z), model(z, training=False)) <= 1e-5
