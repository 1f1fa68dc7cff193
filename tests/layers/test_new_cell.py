"""A cell of a new kind in one file outside the package: a minimal gated unit.

Zhou et al., 2016, "Minimal gated unit for recurrent neural networks"
(arXiv 1603.09420): one update gate f, with `h = (1 - f) h + f tanh(W x + U (f h))`.
Here the gate acts after the recurrent product, as in a GRU with `reset_after`.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import gap, random_mask, randomize
from keras import ops

from keras_bnrnn import export_saved_model, fold, recalibrate
from keras_bnrnn.layers import BNRNN, BNCell

B, T, D, U = 8, 6, 3, 4


@keras.saving.register_keras_serializable(package="tests")
class MGUCell(BNCell, keras.layers.SimpleRNNCell):
    gates = 2

    def __init__(self, units, recurrent_activation="sigmoid", **arguments):
        super().__init__(units=units, **arguments)
        self.recurrent_activation = keras.activations.get(recurrent_activation)

    def step(self, projected, recurrent, states, weights, norm):
        (h,) = states
        gate, candidate = slice(0, self.units), slice(self.units, 2 * self.units)
        a = norm("joint", projected[:, gate] + recurrent[:, gate], gate)
        f = self.recurrent_activation(a)
        a = projected[:, candidate] + f * recurrent[:, candidate]
        return [(1 - f) * h + f * self.activation(norm("joint", a, candidate))]

    def get_config(self):
        gate = keras.activations.serialize(self.recurrent_activation)
        return {**super().get_config(), "recurrent_activation": gate}


@keras.saving.register_keras_serializable(package="tests")
class MGU(BNRNN):
    cell_class = MGUCell

    def __init__(self, units, **arguments):
        super().__init__(units=units, **arguments)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def in_numpy(layer, x, mask):
    """Outputs (B, T, U) at inference and the last states, float64."""
    cell = layer.cell
    w, u = np.asarray(cell.kernel), np.asarray(cell.recurrent_kernel)
    norm = cell.input_norm
    gamma, beta = np.asarray(norm.gamma), np.asarray(norm.beta)
    mean, variance = np.asarray(norm.moving_mean), np.asarray(norm.moving_variance)

    def normalized(a, part=slice(None)):
        scale = gamma[part] / np.sqrt(variance[part] + norm.epsilon)
        return (a - mean[part]) * scale + beta[part]

    joint = layer.normalize == "joint"
    h = np.zeros((len(x), U))
    outputs = np.zeros((len(x), T, U))
    for t in range(T):
        z = x[:, t] @ w if joint else normalized(x[:, t] @ w)
        r = h @ u
        a = z[:, :U] + r[:, :U]
        f = sigmoid(normalized(a, slice(0, U)) if joint else a)
        a = z[:, U:] + f * r[:, U:]
        a = normalized(a, slice(U, 2 * U)) if joint else a
        new = (1 - f) * h + f * np.tanh(a)
        h = np.where(mask[:, t, None], new, h)
        outputs[:, t] = h
    return outputs, h


@pytest.fixture(params=["input", "joint"])
def normalize(request):
    return request.param


def test_it_equals_numpy(normalize, rng):
    layer = MGU(
        U,
        normalize=normalize,
        return_sequences=True,
        return_state=True,
        dtype="float64",
    )
    layer.build((None, T, D))
    randomize(layer, rng)
    x, mask = rng.normal(size=(B, T, D)), random_mask(rng, B, T)
    outputs, state = layer(x, mask=mask)
    expected, last = in_numpy(layer, x, mask)
    assert gap(outputs, expected) <= 1e-12
    assert gap(state, last) <= 1e-12


@pytest.mark.slow(but=["input-sequence", "input-frame", "joint-frame"])
@pytest.mark.parametrize("statistics", ["sequence", "frame"])
def test_its_gradients_equal_finite_differences(normalize, statistics, rng):
    layer = MGU(U, normalize=normalize, statistics=statistics, dtype="float64")
    layer.build((None, T, D))
    randomize(layer, rng)
    x, mask = tf.constant(rng.normal(size=(B, T, D))), random_mask(rng, B, T)

    def loss():
        return tf.reduce_sum(tf.sin(layer(x, mask=mask, training=True)))

    with tf.GradientTape() as tape:
        value = loss()
    weights = layer.trainable_variables
    gradients = tape.gradient(value, [w.value for w in weights])
    for weight, gradient in zip(weights, gradients, strict=True):
        before, direction = weight.numpy(), rng.normal(size=weight.shape)
        values = []
        for sign in (1, -1):
            weight.assign(before + sign * 1e-6 * direction)
            values.append(float(loss()))
        weight.assign(before)
        expected = (values[0] - values[1]) / 2e-6
        assert np.sum(gradient * direction) == pytest.approx(expected, rel=1e-5)


def model_of(normalize):
    return keras.Sequential(
        [
            keras.Input((None, D)),
            MGU(U, normalize=normalize, name="mgu"),
            keras.layers.Dense(1),
        ]
    )


@pytest.mark.slow
def test_it_trains_recalibrates_saves_exports_and_streams(normalize, rng, tmp_path):
    x = rng.normal(2.0, 1.5, size=(40, T, D)).astype("float32")
    y = x[:, :, 0].mean(1, keepdims=True)
    model = model_of(normalize)
    # One of them with XLA, which takes seconds to compile the loop.
    jit_compile = normalize == "input"
    model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=jit_compile)
    losses = model.fit(x, y, batch_size=B, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]

    recalibrate(model, x, verbose=0)
    norm = model.get_layer("mgu").input_norm
    if normalize == "input":
        seen = np.float64(x) @ np.float64(model.get_layer("mgu").cell.kernel)
        assert gap(norm.moving_mean, seen.mean((0, 1))) <= 1e-5
        assert gap(norm.moving_variance, seen.var((0, 1))) <= 1e-5

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("mgu").recurrent_activation is keras.activations.sigmoid
    assert gap(loaded(x), model(x)) == 0
    assert gap(keras.models.clone_model(model)(x).shape, (40, 1)) == 0

    with pytest.warns(UserWarning, match="kept frozen: mgu"):
        folded, report = fold(model, return_report=True)
    (entry,) = report
    assert entry.kept_because == "no stock layer has the equations of MGU"
    assert gap(folded(x), model(x)) <= 1e-6

    with pytest.warns(UserWarning, match="mgu"):
        export_saved_model(model, tmp_path / "export")
    served = tf.saved_model.load(str(tmp_path / "export" / "1"))
    lengths = np.full(4, T, np.int32)
    answer = served.signatures["serve"](
        **{
            name: tf.constant(v)
            for name, v in inputs_of(served, "serve", x[:4], lengths)
        }
    )
    assert gap(next(iter(answer.values())), model(x[:4])) <= 1e-5

    step = served.signatures["step"]
    start = served.signatures["initial_state"]
    (frame,) = start.structured_input_signature[1]
    states = start(**{frame: tf.constant(x[:4, 0])})
    for t in range(T):
        answer = step(**{frame: tf.constant(x[:4, t])}, **states)
        states = {name: answer[name] for name in states}
    (output,) = set(answer) - set(states)
    assert gap(answer[output], model(x[:4])) <= 1e-5


def inputs_of(served, signature, x, lengths):
    names = served.signatures[signature].structured_input_signature[1]
    return [(name, lengths if name == "lengths" else x) for name in names]


def test_an_unknown_argument_is_named():
    with pytest.raises(ValueError, match=r"MGU.*statistic'"):
        MGU(U, statistic="frame")


def test_its_states_may_overflow_past_the_end_of_a_row(rng):
    """An unbounded recurrence that overflows in the third timestep reaches nothing."""
    layer = MGU(U, activation="relu", recurrent_activation="relu")
    layer.build((None, 40, D))
    layer.cell.recurrent_kernel.assign(np.full((U, 2 * U), 1e6, "float32"))
    mask = np.arange(40) < np.array([[1], [2]])
    x = tf.constant(rng.normal(1.0, 0.1, size=(2, 40, D)), "float32")
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, mask=mask)
        loss = ops.sum(ops.log1p(ops.abs(y)))
    assert np.isfinite(y).all()
    assert np.isfinite(tape.gradient(loss, x)).all()
