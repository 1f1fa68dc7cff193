"""Exported versions answer a C program that has neither Python nor Keras."""

import keras
import numpy as np
import pytest
from helpers import gap, randomize_model

import keras_bnrnn
from keras_bnrnn import export_saved_model, fold

# Both sides are float32 with the same weights; only the order of sums differs.
TOLERANCE = 1e-5


@pytest.mark.slow
def test_the_same_numbers_in_c(serve_in_c, rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, 3), name="x"),
            keras_bnrnn.BNLSTM(4, return_sequences=True, name="lower"),
            keras_bnrnn.BNGRU(5, return_sequences=True, name="upper"),
            keras.layers.Dense(2, name="y"),
        ]
    )
    randomize_model(model, rng)
    path = export_saved_model(model, tmp_path / "m")
    for rows, timesteps in ((1, 7), (9, 5)):
        x = rng.normal(size=(rows, timesteps, 3)).astype("float32")
        lengths = rng.integers(1, timesteps + 1, rows).astype("int32")
        inputs = {"x": x, "lengths": lengths}
        (answer,) = serve_in_c(path, [("serving_default", inputs)])
        assert set(answer) == {"y"}
        expected = fold(model)(x, mask=np.arange(timesteps) < lengths[:, None])
        for row, n in enumerate(lengths):
            assert gap(answer["y"][row, :n], expected[row, :n]) <= TOLERANCE
            assert not answer["y"][row, n:].any()

    x = rng.normal(size=(2, 3, 3)).astype("float32")
    expected = fold(model)(x)
    (states,) = serve_in_c(path, [("initial_state", {"x": x})])
    assert set(states) == {"lower_h", "lower_c", "upper_h", "t"}
    for t in range(3):
        (answer,) = serve_in_c(path, [("step", {"x": x[:, t], **states})])
        states = {name: answer[name] for name in states}
        assert gap(answer["y"], expected[:, t]) <= TOLERANCE
    np.testing.assert_array_equal(states["t"], [3, 3])
