"""Subclasses of the layers: which ones fold, and what else follows their equations."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import gap, randomize, randomize_model
from keras import ops

from keras_bnrnn import (
    BNGRU,
    BNLSTM,
    BNGRUCell,
    BNLSTMCell,
    BNSimpleRNN,
    BNSimpleRNNCell,
    SequenceBatchNorm,
    export_saved_model,
    fold,
)

B, T, D, U = 4, 6, 3, 4


@keras.saving.register_keras_serializable(package="tests")
class Wider(BNLSTM):
    """Other defaults, and an argument of its own: the same function."""

    def __init__(self, units, note="", momentum=0.5, **kwargs):
        super().__init__(units, momentum=momentum, **kwargs)
        self.note = note

    def get_config(self):
        return {**super().get_config(), "note": self.note}


@keras.saving.register_keras_serializable(package="tests")
class DoublingCell(BNLSTMCell):
    def step(self, projected, recurrent, states, weights, norm):
        h, c = super().step(projected, recurrent, states, weights, norm)
        return [2.0 * h, c]


@keras.saving.register_keras_serializable(package="tests")
class Doubling(BNLSTM):
    """A layer whose cell has another step."""

    def __init__(self, units, **kwargs):
        super().__init__(units, **kwargs)
        self.cell = DoublingCell(units)


@keras.saving.register_keras_serializable(package="tests")
class Residual(BNGRU):
    def call(self, sequences, initial_state=None, mask=None, training=False):
        arguments = {"mask": mask, "training": training}
        return 0.5 * super().call(sequences, initial_state, **arguments)


@keras.saving.register_keras_serializable(package="tests")
class Sparse(BNSimpleRNNCell):
    def own_weights(self):
        own = super().own_weights()
        return own._replace(kernel=own.kernel * ops.cast(own.kernel > 0, "float32"))


@keras.saving.register_keras_serializable(package="tests")
class ScaledNorm(SequenceBatchNorm):
    def call(self, inputs, mask=None, training=None):
        return 3.0 * super().call(inputs, mask=mask, training=training)


def model_of(layer):
    return keras.Sequential([keras.Input((T, D), name="x"), layer])


KEPT = {
    "step of the cell": (lambda: Doubling(U, name="own"), r"DoublingCell\.step"),
    "call": (lambda: Residual(U, name="own"), r"Residual\.call"),
    "own_weights of a cell": (
        lambda: keras.layers.RNN(Sparse(U, name="own")),
        r"Sparse\.own_weights",
    ),
    "norm": (lambda: ScaledNorm(name="own"), r"ScaledNorm\.call"),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_functions_are_kept_and_reported(name, rng):
    make, reason = KEPT[name]
    model = model_of(make())
    randomize_model(model, rng)
    with pytest.warns(UserWarning, match=rf"kept frozen: own \(.*{reason}"):
        folded, (entry,) = fold(model, return_report=True)
    assert entry.folded_into is None
    x = rng.normal(size=(B, T, D)).astype("float32")
    assert gap(folded(x), model(x, training=False)) <= 1e-6
    assert gap(folded(x, training=True), folded(x)) == 0.0  # frozen


def test_the_export_keeps_them(rng, tmp_path):
    model = model_of(Doubling(U, return_sequences=True, name="own"))
    randomize_model(model, rng)
    with pytest.warns(UserWarning, match=r"DoublingCell\.step"):
        path = export_saved_model(model, tmp_path / "m")
    serve = tf.saved_model.load(str(path)).signatures["serve"]
    x = rng.normal(size=(B, T, D)).astype("float32")
    inputs = {name: tf.constant(x) for name in ["x"]}
    if "lengths" in serve.structured_input_signature[1]:
        inputs["lengths"] = tf.fill([B], T)
    (answer,) = serve(**inputs).values()
    assert gap(answer, model(x, training=False)) <= 1e-5


def test_other_defaults_fold(rng):
    model = model_of(Wider(U, note="kept", name="own"))
    randomize_model(model, rng)
    folded, (entry,) = fold(model, return_report=True)
    assert entry.folded_into == "LSTM" and entry.layer == "Wider"
    assert type(folded.get_layer("own")) is keras.layers.LSTM
    x = rng.normal(size=(B, T, D)).astype("float32")
    assert gap(folded(x), model(x, training=False)) <= 1e-5


def test_another_step_is_not_differentiated_by_the_inherited_derivative(rng):
    layer = Doubling(U, return_sequences=True)
    layer.build((None, T, D))
    randomize(layer, rng)
    x = tf.constant(rng.normal(size=(B, T, D)).astype("float32"))
    upstream = tf.constant(rng.normal(size=(B, T, U)).astype("float32"))

    def by_hand(x):
        weights = layer.cell.folded_weights()
        h = c = tf.zeros((B, U))
        outputs = []
        for t in range(T):
            a = x[:, t] @ weights.kernel + weights.bias + h @ weights.recurrent_kernel
            i, f, candidate, o = tf.split(a, 4, axis=-1)
            c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(candidate)
            h = 2.0 * tf.sigmoid(o) * tf.tanh(c)
            outputs.append(h)
        return tf.stack(outputs, axis=1)

    gradients = []
    for function in (layer, by_hand):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        sources = [x, layer.cell.kernel.value, layer.cell.recurrent_kernel.value]
        gradients.append([y, *tape.gradient(y, sources, output_gradients=upstream)])
    for received, expected in zip(*gradients, strict=True):
        assert gap(received, expected) <= 1e-5 * max(1.0, np.max(np.abs(expected)))


@pytest.mark.parametrize(
    ("layer_class", "cell_class"), [(BNLSTM, BNLSTMCell), (BNGRU, BNGRUCell)]
)
def test_no_fused_kernel_runs_another_step(layer_class, cell_class, monkeypatch):
    monkeypatch.setattr("keras_bnrnn.backend.has_fused_kernels", lambda: True)

    class Other(cell_class):
        def step(self, *arguments):
            return super().step(*arguments)

    layer = layer_class(U)
    assert layer._why_not_fused() is None
    layer.cell = Other(U)
    assert "have a kernel" in layer._why_not_fused()


# Parts of a step


def test_columns_may_be_normalised_in_any_order(rng):
    """A cell that normalises its last columns first learns the same statistics."""

    class LastFirst(BNSimpleRNNCell):
        order = (slice(2, U), slice(0, 2))

        def step(self, projected, recurrent, states, weights, norm):
            a = projected + recurrent
            parts = {s.start: norm("joint", a[:, s], s) for s in self.order}
            return [self.activation(ops.concatenate([parts[0], parts[2]], axis=-1))]

    x = rng.normal(size=(8, T, D)).astype("float32") * [1.0, 5.0, 0.2]
    layers = [BNSimpleRNN(U, normalize="joint"), BNSimpleRNN(U, normalize="joint")]
    layers[1].cell = LastFirst(U, normalize="joint")
    for layer in layers:
        layer.build((None, T, D))
    layers[0].cell.kernel.assign(rng.normal(size=(D, U)))
    layers[1].set_weights(layers[0].get_weights())
    outputs = [layer(x, training=True) for layer in layers]
    assert gap(*outputs) <= 1e-6
    for a, b in zip(*(layer.get_weights() for layer in layers), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    x = ops.convert_to_tensor(x)
    seen = [layer.pre_activations("joint", x)[0] for layer in layers]
    assert gap(*seen) <= 1e-6

    layers[1].cell.order = (slice(2, U), slice(0, 2), slice(0, 2))
    with pytest.raises(ValueError, match=r"columns.*\(0, 2\), \(0, 2\), \(2, 4\)"):
        layers[1](x, training=True)


def test_an_error_in_an_rnn_ends_its_trial_step(rng):
    cell = BNSimpleRNNCell(U)
    layer = keras.layers.RNN(cell)
    x = rng.normal(size=(8, T, D)).astype("float32")
    layer(x, training=True)
    count = float(cell.input_norm.update_count)

    step, fails = cell.step, [False]

    def failing(*arguments):
        if fails[0]:
            raise RuntimeError("stop")
        fails[0] = True  # the trial goes well, the loop does not
        return step(*arguments)

    cell.step = failing
    with pytest.raises(RuntimeError, match="stop"):
        layer(x, training=True)
    cell.step = step
    cell.input_norm.update_count.assign(count)

    # By itself the cell has no trial: two calls with one state are two updates.
    state = [ops.zeros((8, U))]
    cell(x[:, 0], state, training=True)
    cell(x[:, 0], state, training=True)
    assert float(cell.input_norm.update_count) == count + 2


def test_another_loop_kernel_is_differentiated_and_kept(rng):
    @keras.saving.register_keras_serializable(package="tests")
    class SparseCell(BNSimpleRNNCell):
        def loop_kernel(self, weights):
            kernel = weights.recurrent_kernel
            return kernel * ops.cast(kernel > 0, kernel.dtype)

    @keras.saving.register_keras_serializable(package="tests")
    class SparseLayer(BNSimpleRNN):
        cell_class = SparseCell

    layer = SparseLayer(U)
    layer.build((None, T, D))
    randomize(layer, rng)
    x = tf.constant(rng.normal(size=(8, T, D)), "float32")
    kernel = layer.cell.recurrent_kernel
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer(x)))
    gradient = np.asarray(tape.gradient(loss, kernel.value))
    assert np.abs(gradient).max() > 0
    assert not gradient[np.asarray(kernel) <= 0].any()
    model = keras.Sequential([keras.Input((T, D)), layer])
    with pytest.warns(UserWarning, match="SparseCell.loop_kernel"):
        assert gap(fold(model)(x), model(x)) <= 1e-6


def test_another_step_may_not_be_bounded(rng):
    """A subclass inherits no promise that its states stay finite."""

    class GrowingCell(BNSimpleRNNCell):
        def step(self, projected, recurrent, states, weights, norm):
            (h,) = super().step(projected, recurrent, states, weights, norm)
            return [3.0 * states[0] + h]

    class Growing(BNSimpleRNN):
        cell_class = GrowingCell

    layer = Growing(U)
    x = tf.constant(rng.normal(size=(2, 300, D)), "float32")
    mask = np.arange(300) < np.array([[4], [2]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, mask=mask)
    assert np.isfinite(y).all()
    assert np.isfinite(tape.gradient(y, x)).all()


def test_an_activation_may_be_singular_at_zero(rng):
    def unit(a):
        return a / ops.norm(a, axis=-1, keepdims=True)

    x = tf.constant(rng.normal(size=(3, T, D)), "float32")
    mask = np.arange(T) < np.array([[4], [2], [T]])
    for cls in (BNLSTM, BNGRU, BNSimpleRNN):
        layer = cls(U, activation=unit)
        with tf.GradientTape() as tape:
            y = layer(x, mask=mask)
        weights = [w.value for w in layer.trainable_variables]
        for value in [y, *tape.gradient(y, weights)]:
            assert np.isfinite(value).all()
