"""Batches that the population statistics leave out: not finite, or of single rows."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import KINDS, gap

import keras_bnrnn
from keras_bnrnn import (
    BNLSTM,
    BNSimpleRNN,
    SequenceBatchNorm,
    backend,
    fold,
    recalibrate,
)

B, T, D, U = 4, 5, 3, 4
EACH = pytest.mark.parametrize("kind", KINDS)
HOW = pytest.mark.parametrize("how", ["eager", "graph", "xla"])


def frames(rng, *shape):
    return rng.normal(2.0, 3.0, shape or (B, T, D)).astype("float32")


def population(norm):
    variables = (norm.moving_mean, norm.moving_variance, norm.update_count)
    return [np.asarray(v).copy() for v in variables]


def is_same(before, after):
    return all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def trained(layer, how):
    """A function of inputs to what a training call of the layer gives."""
    call = lambda x: layer(x, training=True)  # noqa: E731
    return call if how == "eager" else tf.function(call, jit_compile=how == "xla")


NORMS = {
    "sequence": lambda: SequenceBatchNorm(),
    "frame": lambda: SequenceBatchNorm(statistics="frame"),
    "simple_rnn": lambda: keras_bnrnn.BNSimpleRNN(U),
    "lstm-frame": lambda: BNLSTM(U, statistics="frame"),
    "gru-joint": lambda: keras_bnrnn.BNGRU(U, normalize="joint"),
    "cell": lambda: keras.layers.RNN(keras_bnrnn.BNLSTMCell(U)),
}


def norm_of(layer):
    if isinstance(layer, SequenceBatchNorm):
        return layer
    return layer.cell.input_norm


@pytest.mark.slow(
    but=[
        "sequence-eager",
        "frame-graph",
        "simple_rnn-xla",
        "lstm-frame-eager",
        "gru-joint-eager",
        "cell-eager",
    ]
)
@HOW
@pytest.mark.parametrize("name", NORMS)
def test_a_batch_that_is_not_finite_changes_nothing(name, how, rng):
    layer = NORMS[name]()
    layer.build((None, None, D))
    norm = norm_of(layer)
    call = trained(layer, how)
    call(frames(rng))
    before, weights = population(norm), len(layer.weights)
    assert norm.nonfinite_batches == 0

    # All of a timestep, one number, an infinity, one whose square overflows.
    bad = [frames(rng) for _ in range(4)]
    bad[0][:, -1] = np.nan
    bad[1][1, 0, 2] = np.nan
    bad[2][0, 0, 0] = np.inf
    bad[3][0, 0, :] = 3e38
    if name == "cell":  # one of a timestep is an update: leave no other timestep
        bad = [x[:, :1] for x in (bad[1], bad[2], bad[3])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in bad:
            call(x)
            assert is_same(before, population(norm))
    assert norm.nonfinite_batches == len(bad)
    messages = [str(w.message) for w in caught if "not finite" in str(w.message)]
    assert len(messages) == (0 if how == "xla" else 1)  # once, where it can be said
    assert all(norm.path in m and "nonfinite_batches" in m for m in messages)
    assert len(layer.weights) == weights  # the counter is no weight

    call(frames(rng))
    after = population(norm)
    assert np.all(np.isfinite(after[0])) and after[2] > before[2]


def test_the_counter_is_no_weight_and_old_files_load(rng, tmp_path):
    model = keras.Sequential([keras.Input((None, D)), BNLSTM(U, name="lstm")])
    paths = [w.path for w in model.weights]
    assert not any("nonfinite" in path for path in paths)
    model(frames(rng) * np.nan, training=True)
    assert model.get_layer("lstm").nonfinite_batches == 1
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("lstm").nonfinite_batches == 0
    x = frames(rng)
    assert gap(model(x), loaded(x)) == 0.0
    assert BNLSTM(U).nonfinite_batches == 0  # before it is built, too


def test_fit_goes_on_where_the_optimizer_skips_the_step(rng):
    """Loss scaling skips a step that is not finite; the statistics must, too."""
    model = keras.Sequential(
        [keras.Input((T, D)), BNLSTM(U, name="lstm"), keras.layers.Dense(1)]
    )
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    model.compile(optimizer, "mse", jit_compile=True)
    x = frames(rng, 3 * B, T, D)
    x[B + 1, 2, 0] = np.inf
    model.fit(x, np.zeros((3 * B, 1)), batch_size=B, shuffle=False, verbose=0)
    norm = model.get_layer("lstm").input_norm
    assert norm.nonfinite_batches == 1
    assert float(norm.update_count) == 2
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


def test_recalibrate_fold_and_export_mention_the_counter(rng, tmp_path):
    model = keras.Sequential([keras.Input((T, D)), BNLSTM(U, name="lstm")])
    x = frames(rng)
    with pytest.warns(UserWarning, match="not finite"):
        model(x * np.nan, training=True)
    uses = {
        "recalibrate": lambda: recalibrate(model, x, verbose=0),
        "fold": lambda: fold(model),
        "export": lambda: keras_bnrnn.export_saved_model(model, tmp_path / "m"),
    }
    for use in uses.values():
        with pytest.warns(UserWarning, match="not finite were left out.*1 of '.*lstm/"):
            use()


def test_recalibrate_refuses_data_that_is_not_finite(rng):
    model = keras.Sequential(
        [
            keras.Input((None, D)),
            keras.layers.Masking(),
            BNSimpleRNN(U, return_sequences=True, name="below"),
            SequenceBatchNorm(name="above"),
        ]
    )
    x = frames(rng, 8, T, D)
    recalibrate(model, x, verbose=0)
    before = model.get_weights()
    bad = x.copy()
    bad[5, 1, 1] = np.nan
    with pytest.raises(ValueError, match=r"finite.*batch 2 of `data`.*'below'"):
        recalibrate(model, bad, batch_size=4, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    # Weights that are not finite reach the layer above alone.
    layer = model.get_layer("below")
    layer.cell.recurrent_kernel.assign(layer.cell.recurrent_kernel * np.nan)
    with pytest.raises(ValueError, match=r"finite.*'above'"):
        recalibrate(model, x, verbose=0)


# Single rows


@pytest.mark.slow(
    but=["frame-eager", "lstm-frame-graph", "gru-joint-xla", "cell-eager"]
)
@HOW
@pytest.mark.parametrize("name", ["frame", "lstm-frame", "gru-joint", "cell"])
def test_single_rows_change_nothing(name, how, rng):
    layer = NORMS[name]()
    layer.build((None, None, D))
    norm = norm_of(layer)
    call = lambda x: layer(x, training=True)  # noqa: E731
    free = [tf.TensorSpec([None, T, D])]
    call = tf.function(call, input_signature=free, jit_compile=how == "xla")
    tf.config.run_functions_eagerly(how == "eager")
    try:
        call(frames(rng))
        before = population(norm)
        if how == "eager":  # every size is static there: refused, as ever
            with pytest.raises(ValueError, match="must have more than one"):
                call(frames(rng, 1, T, D))
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                call(frames(rng, 1, T, D))
    finally:
        tf.config.run_functions_eagerly(False)
    assert is_same(before, population(norm))
    messages = [str(w.message) for w in caught if "single row" in str(w.message)]
    assert len(messages) == (0 if how == "xla" else 1)
    assert all(norm.path in m and "statistics='sequence'" in m for m in messages)
    assert norm.nonfinite_batches == 0


def test_a_timestep_of_two_rows_is_enough(rng):
    norm = SequenceBatchNorm(statistics="frame")
    x = frames(rng, 2, T, D)
    mask = np.ones((2, T), bool)
    mask[1, 1:] = False  # two rows at the first timestep, one at the others
    norm(x, mask=mask, training=True)
    assert float(norm.update_count) == 1
    mask[1] = False
    before = population(norm)
    with pytest.warns(UserWarning, match="single row"):
        norm(x, mask=mask, training=True)
    assert is_same(before, population(norm))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm(x, mask=np.zeros((2, T), bool), training=True)  # nothing to warn of
    assert is_same(before, population(norm))


def test_fit_does_not_stop_at_a_last_batch_of_one_row(rng):
    model = keras.Sequential(
        [keras.Input((None, D)), BNLSTM(U, statistics="frame", name="lstm")]
    )
    model.compile("sgd", "mse")
    x, y = frames(rng, 2 * B + 1, T, D), np.zeros((2 * B + 1, U))
    with pytest.warns(UserWarning, match="single row"):
        model.fit(x, y, batch_size=B, shuffle=False, verbose=0)
    assert float(model.get_layer("lstm").input_norm.update_count) == 2


def test_sequence_wise_statistics_take_a_single_row(rng):
    norm = SequenceBatchNorm()
    x = frames(rng, 1, T, D)
    norm(x, training=True)
    np.testing.assert_allclose(norm.moving_mean, x.mean((0, 1)), rtol=1e-5)


# What is warned of in a graph


def test_xla_is_known_while_a_function_is_traced():
    """TensorFlow gives no promise of the function that tells."""
    seen = []

    def note(x):
        seen.append(backend.compiled_by_xla())
        return tf.while_loop(lambda i: i < 3, body, [x])[0]

    def body(i):
        seen.append(backend.compiled_by_xla())
        return [i + 1]

    for jit in (False, True, None):
        seen.clear()
        tf.function(note, jit_compile=jit)(tf.constant(0))
        assert seen == [bool(jit)] * 2
    assert not backend.compiled_by_xla()
