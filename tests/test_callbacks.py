"""`Recalibrate`: validation and checkpoints see exact statistics."""

import keras
import numpy as np
import pytest

from keras_bnrnn import BNLSTM, Recalibrate, recalibrate


def data(rng, rows):
    # Far from 0, so that the initial moving averages (0 and 1) are wrong.
    return 3.0 + 2.0 * rng.normal(size=(rows, 5, 3)), rng.normal(size=(rows, 1))


@pytest.fixture
def model():
    model = keras.Sequential(
        [keras.Input((5, 3)), BNLSTM(4, momentum=0.99), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse", run_eagerly=True)  # saves compiling it
    return model


def lag(path, x):
    """By how much `recalibrate` changes the statistics of a saved model."""
    model = keras.saving.load_model(path)
    (moved,) = recalibrate(model, x, verbose=0).values()
    return max(moved.values())


def fit(model, rng, directory, validation=True, **arguments):
    x, y = data(rng, 64)
    callback = Recalibrate(x, **arguments)
    saved = keras.callbacks.ModelCheckpoint(str(directory / "{epoch}.keras"))
    history = model.fit(
        x,
        y,
        epochs=2,
        validation_data=data(np.random.default_rng(1), 16) if validation else None,
        callbacks=[callback, saved],
        verbose=0,
    )
    return x, callback, history.history


def test_validation_and_checkpoints_see_exact_statistics(model, rng, tmp_path):
    x, callback, history = fit(model, rng, tmp_path)
    assert sorted(callback.changes) == [0, 1]
    validation = data(np.random.default_rng(1), 16)
    for epoch in (1, 2):
        path = tmp_path / f"{epoch}.keras"
        assert lag(path, x) < 1e-5  # the sums of float32 pre-activations
        loss = keras.saving.load_model(path).evaluate(*validation, verbose=0)
        assert loss == pytest.approx(history["val_loss"][epoch - 1], rel=1e-5)


def test_moving_averages_alone_lag(model, rng, tmp_path):
    x, callback, _ = fit(model, rng, tmp_path, every=2)
    assert sorted(callback.changes) == [1]
    assert lag(tmp_path / "1.keras", x) > 1e-3
    assert lag(tmp_path / "2.keras", x) < 1e-5


def test_without_validation_it_acts_at_the_end_of_the_epoch(model, rng, tmp_path):
    x, callback, _ = fit(model, rng, tmp_path, validation=False)
    assert sorted(callback.changes) == [0, 1]
    assert lag(tmp_path / "1.keras", x) < 1e-5


def test_steps_bound_the_data(model, rng, tmp_path):
    x, _, _ = fit(model, rng, tmp_path, steps=1, batch_size=16)
    assert lag(tmp_path / "2.keras", x[:16]) < 1e-5
    assert lag(tmp_path / "2.keras", x) > 1e-3


def test_evaluate_changes_nothing(model, rng):
    x, y = data(rng, 64)
    before = model.get_weights()
    callback = Recalibrate(x)
    model.evaluate(x, y, callbacks=[callback], verbose=0)
    assert callback.changes == {}
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "1"])
def test_bad_every(every):
    with pytest.raises(
        ValueError, match=f"`every` must be a positive integer.*{every!r}"
    ):
        Recalibrate(np.zeros((2, 3, 4)), every=every)
