"""`SequenceBatchNorm` on Keras' JAX backend, in a process of its own."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import gap

from keras_bnrnn import SequenceBatchNorm

B, T, F, MOMENTUM, EPSILON = 6, 5, 3, 0.9, 1e-3

STEPS = """
import sys

import jax
import keras
import numpy as np

import keras_bnrnn

folder = sys.argv[1]
given = np.load(folder + "/given.npz")
found = {}
for statistics in ("sequence", "frame"):
    layer = keras_bnrnn.SequenceBatchNorm(
        statistics=statistics, momentum=0.9, epsilon=1e-3
    )
    layer.build(given["x"].shape)
    layer.gamma.assign(given["gamma"])
    layer.beta.assign(given["beta"])
    trained = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]

    @jax.jit
    def step(x, others):
        def loss(x):
            y, new = layer.stateless_call(
                trained, others, x, mask=given["mask"], training=True
            )
            return (y * given["weights"]).sum(), (y, new)

        (_, (y, new)), dx = jax.value_and_grad(loss, has_aux=True)(x)
        return y, dx, new

    y, dx, others = step(given["x"], others)
    _, _, others = step(given["x"][::-1] * 2, others)
    for variable, value in zip(layer.non_trainable_variables, others):
        variable.assign(value)
    found |= {
        statistics + "_y": y,
        statistics + "_dx": dx,
        statistics + "_mean": layer.moving_mean.numpy(),
        statistics + "_variance": layer.moving_variance.numpy(),
        statistics + "_inference": layer(given["x"]),
    }
np.savez(folder + "/found.npz", **found)
try:
    keras_bnrnn.BNLSTM(2)(given["x"])
except NotImplementedError as error:
    assert "KERAS_BACKEND=tensorflow" in str(error)
else:
    raise AssertionError("a time loop ran")
"""

TRAINING = """
import sys

import keras
import numpy as np

import keras_bnrnn

path = sys.argv[1] + "/model.keras"
x = np.random.default_rng(0).normal(size=(6, 5, 3))
y = np.ones((6, 2))
model = keras.Sequential(
    [keras.layers.Dense(4), keras_bnrnn.SequenceBatchNorm(), keras.layers.LSTM(2)]
)
model.compile("sgd", "mse")
before = model.evaluate(x, y, verbose=0)
model.fit(x, y, epochs=20, verbose=0)
assert model.evaluate(x, y, verbose=0) < before
model.save(path)
loaded = keras.saving.load_model(path)
np.testing.assert_array_equal(
    loaded.predict(x, verbose=0), model.predict(x, verbose=0)
)
"""


def normalized(x, mask, gamma, beta, weights, statistics):
    """Outputs and the gradient of their weighted sum in x, in NumPy."""
    y, dx = np.zeros_like(x), np.zeros_like(x)
    counts = np.cumsum(mask, axis=1) - 1  # of valid frames before each frame
    groups = [mask]
    if statistics == "frame":
        groups = [mask & (counts == t) for t in range(x.shape[1])]
    for group in groups:
        if group.any():
            scale = 1 / np.sqrt(x[group].var(axis=0) + EPSILON)
            centred = (x[group] - x[group].mean(axis=0)) * scale
            y[group] = centred * gamma + beta
            d = weights[group] * gamma
            through = d - d.mean(axis=0) - centred * (d * centred).mean(axis=0)
            dx[group] = through * scale
    return y, dx


def run(program, folder):
    pytest.importorskip("jax")
    subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        check=True,
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow
def test_a_model_trains_and_loads_on_jax(tmp_path):
    run(TRAINING, tmp_path)


def test_steps_of_sequence_batch_norm_on_jax(tmp_path, rng):
    given = {
        "x": rng.normal(3.0, 2.0, (B, T, F)).astype("float32"),
        "gamma": rng.normal(1.0, 0.3, F).astype("float32"),
        "beta": rng.normal(size=F).astype("float32"),
        "mask": rng.random((B, T)) < 0.7,
    }
    given["mask"][:3] = True  # no group of one frame, whose gradient float32 loses
    given["weights"] = rng.normal(size=(B, T, F)).astype("float32")
    given["weights"][~given["mask"]] = 0.0
    np.savez(tmp_path / "given.npz", **given)
    run(STEPS, tmp_path)
    found = np.load(tmp_path / "found.npz")
    exact = {k: v if k == "mask" else v.astype("float64") for k, v in given.items()}
    for statistics in ("sequence", "frame"):
        y, dx = normalized(**exact, statistics=statistics)
        mask = given["mask"]
        # Float32, of numbers of order 1.
        assert gap(found[statistics + "_y"][mask], y[mask]) <= 1e-5
        assert gap(found[statistics + "_dx"], dx) <= 1e-5
        layer = SequenceBatchNorm(
            statistics=statistics, momentum=MOMENTUM, epsilon=EPSILON
        )
        layer.build((B, T, F))
        layer.gamma.assign(given["gamma"])
        layer.beta.assign(given["beta"])
        for x in (given["x"], given["x"][::-1] * 2):
            layer(x, mask=mask, training=True)
        assert gap(found[statistics + "_mean"], layer.moving_mean) <= 1e-5
        assert gap(found[statistics + "_variance"], layer.moving_variance) <= 1e-4
        assert gap(found[statistics + "_inference"], layer(given["x"])) <= 1e-5
