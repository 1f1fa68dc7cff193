"""`normalize_model`: normalised layers, and the same numbers."""

import functools
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import KINDS, gap, random_mask, randomize, randomize_model
from keras import layers

import keras_bnrnn
from keras_bnrnn import fold, normalize_model, recalibrate
from keras_bnrnn.layers import BNRNN, BNCell
from keras_bnrnn.traversal import sublayers

B, T, D, U = 6, 5, 3, 4
STOCK = {kind: stock for kind, (_, stock) in KINDS.items()}
CELLS = {
    kind: (layer.cell_class, layer.cell_class.stock_cell)
    for kind, (layer, _) in KINDS.items()
}
EACH = pytest.mark.parametrize("kind", KINDS)


def frames(rng, *shape):
    # A mean that is not 0, and another deviation for each feature.
    shape = shape or (B, T, D)
    scales = np.linspace(0.5, 2.0, shape[-1])
    return (rng.normal(size=shape) * scales + 0.7).astype("float32")


def stock(kind, units=U, **arguments):
    arguments.setdefault("return_sequences", True)
    return STOCK[kind](units, **arguments)


def sequential(*parts, shape=(None, D)):
    return keras.Sequential([keras.Input(shape), *parts])


def is_normalized(layer):
    return isinstance(layer, (BNRNN, BNCell))


def check(model, x, rng=None, at_most=1e-5, **arguments):
    """Normalises; equal, named alike, and the source as it was. Returns the model."""
    if rng is not None:
        randomize_model(model, rng)
    before = [np.asarray(v).copy() for v in model.variables]
    flags = [layer.trainable for layer in sublayers(model)]
    config = model.get_config()
    normalized = normalize_model(model, x, verbose=0, **arguments)
    assert model.get_config() == config
    assert [layer.trainable for layer in sublayers(model)] == flags
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    mine = {id(v) for v in model.variables}
    assert not [v.path for v in normalized.variables if id(v) in mine]

    assert type(normalized) is type(model) and normalized.name == model.name
    assert [a.name for a in normalized.layers] == [a.name for a in model.layers]
    assert not any(type(part) in STOCK.values() for part in sublayers(normalized))
    expected, outputs = model(x, training=False), normalized(x, training=False)
    keras.tree.assert_same_structure(expected, outputs)
    for a, b in zip(*map(keras.tree.flatten, (expected, outputs)), strict=True):
        assert a.dtype == b.dtype and np.max(np.abs(a)) > 1e-2
        assert gap(a, b) <= at_most
    return normalized


def moments(a, mask=None):
    """Mean and variance of pre-activations (B, T, F) over valid frames, in float64."""
    a = np.asarray(a, "float64").reshape(-1, a.shape[-1])
    if mask is not None:
        a = a[np.asarray(mask).reshape(-1)]
    return a.mean(0), a.var(0)


def check_statistics(cell, x, stock_cell, mask=None, epsilon=1e-3):
    """Compares with moments that NumPy takes of the stock layer's input projection."""
    kernel = np.asarray(stock_cell.kernel, "float64")
    mean, variance = moments(np.asarray(x, "float64") @ kernel, mask)
    bias = np.zeros_like(mean)
    if stock_cell.bias is not None:
        bias = np.asarray(stock_cell.bias, "float64")
        if bias.ndim == 2:  # of a GRU
            bias, recurrent_bias = bias
            np.testing.assert_array_equal(cell.recurrent_bias, recurrent_bias)
    norm = cell.input_norm
    # Float32 inputs of layers: 1e-5.
    np.testing.assert_allclose(norm.moving_mean, mean, atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance, variance, rtol=1e-5)
    np.testing.assert_allclose(norm.gamma, np.sqrt(variance + epsilon), rtol=1e-5)
    np.testing.assert_allclose(norm.beta, mean + bias, atol=1e-5)


# Equal outputs and exact statistics


@pytest.mark.slow(but=["simple_rnn"])
@EACH
def test_statistics_gamma_and_beta(kind, rng):
    mask = random_mask(rng, B, T)
    x = np.where(mask[..., None], frames(rng), 9.0).astype("float32")
    model = sequential(
        layers.Masking(9.0), stock(kind), stock(kind, 2, return_sequences=False)
    )
    arguments = {"epsilon": 0.03, "momentum": 0.8, "statistics": "frame"}
    normalized = check(model, x, rng, batch_size=4, **arguments)
    below = x
    for old, new in zip(model.layers[1:], normalized.layers[1:], strict=True):
        assert type(new) is KINDS[kind][0]
        assert {name: getattr(new, name) for name in arguments} == arguments
        check_statistics(new.cell, below, old.cell, mask, epsilon=0.03)
        below = old(below, mask=mask)
    assert all(
        max(moved.values()) < 1e-5
        for moved in recalibrate(normalized, x, verbose=0).values()
    )


@pytest.mark.slow(but=["gru-joint-True"])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("normalize", ["input", "joint"])
@EACH
def test_sites_and_biases(kind, normalize, use_bias, rng):
    variants = [{"reset_after": True}, {"reset_after": False}]
    parts = [
        stock(kind, use_bias=use_bias, **variant)
        for variant in (variants if kind == "gru" else [{}])
    ]
    x = frames(rng)
    normalized = check(sequential(*parts), x, rng, normalize=normalize)
    assert all(part.use_bias for part in normalized.layers)
    assert all(part.normalize == normalize for part in normalized.layers)
    moved = recalibrate(normalized, x, verbose=0)
    assert max(value for change in moved.values() for value in change.values()) < 1e-5


def test_joint_statistics_are_those_of_the_sums(rng):
    model = sequential(stock("simple_rnn", activation="linear"))
    x = frames(rng)
    normalized = check(model, x, rng, normalize="joint")
    bias = np.asarray(model.layers[0].cell.bias)
    mean, variance = moments(np.asarray(model(x)) - bias)
    norm = normalized.layers[0].input_norm
    np.testing.assert_allclose(norm.moving_mean, mean, atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance, variance, rtol=1e-5)


@pytest.mark.slow
def test_deep_model(rng):
    """Masks from an embedding, directions of other layers, stacked cells."""
    backward = stock("gru", go_backwards=True, name="other")
    cells = [layers.GRUCell(U), layers.LSTMCell(D, use_bias=False)]
    model = sequential(
        layers.Embedding(9, D, mask_zero=True),
        layers.Bidirectional(stock("lstm"), backward_layer=backward, name="both"),
        layers.RNN(cells, return_sequences=True, name="stack"),
        layers.RNN(layers.SimpleRNNCell(U), return_sequences=True, name="single"),
        layers.Bidirectional(stock("gru", return_sequences=False), merge_mode="sum"),
        shape=(None,),
    )
    ids = rng.integers(0, 9, (B, T))
    randomize_model(model, rng)
    normalized, report = normalize_model(model, ids, verbose=0, return_report=True)
    assert gap(model(ids), normalized(ids)) <= 1e-5
    assert [entry.name for entry in report] == [
        *("forward_lstm", "other", "gru_cell", "lstm_cell", "simple_rnn_cell"),
        *("forward_gru", "backward_gru"),
    ]
    assert [entry.normalized_into for entry in report] == [
        *("BNLSTM", "BNGRU", "BNGRUCell", "BNLSTMCell", "BNSimpleRNNCell"),
        *("BNGRU", "BNGRU"),
    ]
    assert [entry.changed for entry in report if entry.name == "lstm_cell"] == [
        {"use_bias": True}
    ]
    assert not any(entry.kept_because for entry in report)

    embedded, mask = np.asarray(model.layers[0](ids)), ids != 0
    old, new = model.get_layer("both"), normalized.get_layer("both")
    for name in ("forward_layer", "backward_layer"):
        args = getattr(new, name).cell, embedded, getattr(old, name).cell
        check_statistics(*args, mask)
    x = old(embedded, mask=mask)
    check_statistics(
        normalized.get_layer("stack").cell.cells[0],
        np.asarray(x),
        model.get_layer("stack").cell.cells[0],
        mask,
    )
    folded = fold(normalized)
    assert gap(model(ids), folded(ids)) <= 1e-5
    assert not any(is_normalized(part) for part in sublayers(folded))


def test_functional_model_with_shared_layers_states_and_nested_models(rng):
    a, b = keras.Input((None, D), name="a"), keras.Input((None, D), name="b")
    shared = stock("lstm", D, name="shared")
    inner = sequential(shared, layers.Dense(D))
    mixed = keras.ops.tanh(shared(a) + inner(b))
    last, *states = stock("gru", return_state=True, return_sequences=False)(mixed)
    again = stock("gru")(shared(b), initial_state=states)
    outputs = {"last": last, "again": again}
    model = keras.Model({"a": a, "b": b}, outputs)
    x = {"a": frames(rng), "b": 2.0 * frames(rng)}
    normalized = check(model, x, rng)
    copies = [part for part in sublayers(normalized) if part.name == "shared"]
    assert len(copies) == 1 and type(copies[0]) is keras_bnrnn.BNLSTM
    # Its statistics are over its four calls: a, b in the nested model, and b again.
    seen = np.concatenate([x["a"], x["b"], x["b"]])
    check_statistics(copies[0].cell, seen, shared.cell)


@pytest.mark.slow
@EACH
def test_time_distributed(kind, rng):
    inner = keras.Sequential([keras.Input((T, D)), stock(kind, return_sequences=False)])
    model = sequential(
        layers.TimeDistributed(stock(kind, D)),
        layers.TimeDistributed(inner),
        shape=(2, T, D),
    )
    x = frames(rng, B, 2, T, D)
    normalized = check(model, x, rng)
    cells = [model.layers[0].layer.cell, normalized.layers[0].layer.cell]
    check_statistics(cells[1], x, cells[0])


def test_features_without_variance(rng):
    x = frames(rng)
    x[..., 0] = 3.0
    layer = stock("lstm")
    model = sequential(layer)
    randomize_model(model, rng)
    kernel = np.asarray(layer.cell.kernel).copy()
    kernel[1:, :5] = 0.0  # five pre-activations that are constant
    layer.cell.kernel.assign(kernel)
    normalized = check(model, x)
    norm = normalized.layers[0].input_norm
    np.testing.assert_allclose(norm.moving_variance[:5], 0.0, atol=1e-12)
    np.testing.assert_allclose(norm.gamma[:5], np.sqrt(1e-3), rtol=1e-5)
    # In training a constant becomes its beta: nothing changes.
    columns = np.asarray(norm.beta)[:5]
    expected = 3.0 * kernel[0, :5] + np.asarray(layer.cell.bias)[:5]
    np.testing.assert_allclose(columns, expected, atol=1e-5)
    assert np.isfinite(normalized(x, training=True)).all()


def test_a_mean_far_from_zero(rng):
    x = frames(rng) + 100.0
    model = sequential(stock("gru"))
    randomize_model(model, rng)
    # Sums of terms of about 100 in float32: 1e-7 of that.
    check(model, x, at_most=1e-4)


# What is carried over

VALUES = {
    "activation": "softsign",
    "recurrent_activation": "hard_sigmoid",
    "kernel_initializer": "he_normal",
    "recurrent_initializer": "glorot_normal",
    "bias_initializer": "ones",
    "unit_forget_bias": False,
    "kernel_regularizer": keras.regularizers.L2(0.1),
    "recurrent_regularizer": keras.regularizers.L1(0.2),
    "bias_regularizer": keras.regularizers.L2(0.3),
    "activity_regularizer": keras.regularizers.L1(0.4),
    "kernel_constraint": keras.constraints.MaxNorm(3.0),
    "recurrent_constraint": keras.constraints.MaxNorm(4.0),
    "bias_constraint": keras.constraints.MaxNorm(5.0),
    "dropout": 0.1,
    "recurrent_dropout": 0.2,
    "seed": 7,
    "return_sequences": True,
    "return_state": True,
    "go_backwards": True,
    "stateful": True,
    "unroll": True,
    "use_cudnn": False,
    "reset_after": False,
    "zero_output_for_mask": True,
    "name": "of_its_own",
    "trainable": False,
    "dtype": "float64",
}


@EACH
def test_every_argument_is_carried_over(kind, rng):
    known = {"zero_output_for_mask", "name", "trainable", "dtype"}
    known |= set(inspect.signature(STOCK[kind]).parameters)
    arguments = {name: value for name, value in VALUES.items() if name in known}
    assert known - set(arguments) == {"units", "use_bias", "kwargs"}
    layer = STOCK[kind](U, **arguments)
    inputs = keras.Input(batch_shape=(B, T, D))
    model = keras.Model(inputs, layer(inputs)[0])
    normalized = normalize_model(model, frames(rng), verbose=0)
    copy = normalized.get_layer("of_its_own")
    config = {**copy.get_config(), "seed": copy.cell.seed}
    for name, value in layer.get_config().items():
        assert config[name] == value, name
    assert getattr(copy, "use_cudnn", False) is False
    assert copy.cell.input_norm.dtype_policy.name == "float64"

    cell = CELLS[kind][1](U, **{k: v for k, v in arguments.items() if k in CELL})
    rnn = layers.RNN(cell, go_backwards=True, return_sequences=True, name="rnn")
    normalized = normalize_model(sequential(rnn), frames(rng), verbose=0)
    config = normalized.get_layer("rnn").cell.get_config()
    for name, value in cell.get_config().items():
        assert config[name] == value, name
    assert normalized.get_layer("rnn").go_backwards


CELL = set(VALUES) - {
    *("activity_regularizer", "return_sequences", "return_state", "go_backwards"),
    *("stateful", "unroll", "use_cudnn", "zero_output_for_mask", "dtype"),
    *("recurrent_activation", "unit_forget_bias", "reset_after"),  # not of each kind
}


def test_trainable_flags_of_parts(rng):
    rnn = functools.partial(stock, "simple_rnn")
    inner = sequential(rnn(), layers.Dense(D), rnn())
    both = layers.Bidirectional(rnn(D))
    model = keras.Sequential([keras.Input((None, D)), inner, both, rnn()])
    inner.layers[0].trainable = False
    both.forward_layer.trainable = False
    model.layers[2].cell.trainable = False
    normalized = check(model, frames(rng), rng)
    inner, both, last = normalized.layers
    flags = [part.trainable for part in (inner, *inner.layers, both, last)]
    assert flags == [True, False, True, True, True, True]
    assert [both.forward_layer.trainable, both.backward_layer.trainable] == [False, 1]
    assert not last.trainable_weights
    assert not inner.layers[0].input_norm.trainable


@pytest.mark.slow
def test_states_of_stateful_layers(rng):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(B, T, D)),
            stock("lstm", stateful=True),
            layers.RNN([layers.GRUCell(U), layers.LSTMCell(2)], stateful=True),
        ]
    )
    randomize_model(model, rng)
    x = frames(rng)
    first = np.asarray(model(x))
    normalized = normalize_model(model, x, batch_size=B, verbose=0)
    again = model(x)
    assert gap(again, first) > 1e-3
    assert gap(normalized(x), again) <= 1e-5


@pytest.mark.slow(but=["mixed_float16"])
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_half_precision(policy, rng):
    layer = stock("lstm", dtype=policy)
    model = sequential(layer, stock("gru", 2, return_sequences=False, dtype="float32"))
    randomize_model(model, rng)
    x = frames(rng)
    # A few roundings of pre-activations of about 4: 2^-11 and 2^-8 of that each.
    at_most = 0.05 if "bfloat16" in policy else 0.01
    normalized = check(model, x, at_most=at_most)
    copy = normalized.layers[0]
    assert copy.dtype_policy.name == policy
    assert copy.cell.kernel.dtype == layer.cell.kernel.dtype
    assert copy.input_norm.moving_mean.dtype == "float32"


@pytest.mark.slow
def test_float64(rng, float64):
    model = sequential(stock("lstm"), stock("gru"))
    check(model, frames(rng).astype("float64"), rng, at_most=1e-12)


def test_the_compiled_model_trains_on(rng):
    model = sequential(stock("lstm"), layers.Dense(1))
    optimizer = keras.optimizers.Adam(0.03, clipnorm=1.0)
    model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=True)
    randomize_model(model, rng)
    x = frames(rng, 32, T, D)
    y = np.cumsum(x[..., :1], axis=1)
    normalized = normalize_model(model, x, verbose=0)
    assert normalized.optimizer is not model.optimizer
    assert normalized.optimizer.get_config() == optimizer.get_config()
    assert normalized.optimizer.iterations == 0 and normalized.run_eagerly
    before = normalized.evaluate(x, y, verbose=0)
    # Means of float32 squares: 1e-5.
    assert before == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-5)
    norm = normalized.layers[0].input_norm
    mean = np.asarray(norm.moving_mean).copy()
    normalized.fit(x, y, batch_size=32, epochs=3, verbose=0)
    assert normalized.evaluate(x, y, verbose=0)[0] < before[0]
    # The statistics move on from those of the data: they are not overwritten.
    assert 0 < gap(norm.moving_mean, mean) < 0.2

    model.compile("adam", lambda y, outputs: keras.ops.mean((y - outputs) ** 2))
    assert not normalize_model(model, x, verbose=0).compiled


# Data


class Batches(keras.utils.PyDataset):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.x[4 * index : 4 * index + 4], np.zeros(4)


@pytest.mark.slow
def test_kinds_of_data(rng):
    x = frames(rng, 8, T, D)
    model = sequential(stock("lstm"))
    randomize_model(model, rng)
    datasets = {
        "array": x,
        "tensor": tf.constant(x),
        "list": [x[:3], x[3:]],
        "dataset": tf.data.Dataset.from_tensor_slices((x, x)).batch(3),
        "pydataset": Batches(x),
    }
    results = [
        normalize_model(model, data, verbose=0).layers[0].input_norm.moving_mean
        for data in datasets.values()
    ]
    endless = tf.data.Dataset.from_tensor_slices(x).batch(4).repeat()
    first = normalize_model(model, endless, steps=2, verbose=0).layers[0].input_norm
    for result in (*results, first.moving_mean):
        np.testing.assert_allclose(result, results[0], atol=1e-6)


def test_progress_is_shown(rng, capsys):
    model = sequential(stock("lstm", name="first"), stock("gru", name="second"))
    normalize_model(model, frames(rng))
    assert "Calibrating first, second" in capsys.readouterr().out


# What is kept, and what is refused


@keras.saving.register_keras_serializable(package="test_normalizing")
class OwnLSTM(layers.LSTM):
    """A subclass that may have other equations."""


@keras.saving.register_keras_serializable(package="test_normalizing")
class OwnLayer(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.GRU(D, return_sequences=True)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x) + x


@keras.saving.register_keras_serializable(package="test_normalizing")
class OwnCell(layers.Layer):
    state_size = D

    def call(self, x, states):
        return x, [x]


def test_layers_that_are_kept(rng):
    normalized_already = keras_bnrnn.BNGRU(D, return_sequences=True, name="ours")
    model = sequential(
        OwnLSTM(D, return_sequences=True, name="subclass"),
        OwnLayer(name="holder"),
        layers.RNN(OwnCell(name="cell"), return_sequences=True, name="rnn"),
        stock("gru", D, dropout=1.0, name="dropping"),
        normalized_already,
        stock("lstm", name="plain"),
    )
    randomize_model(model, rng)
    x = frames(rng)
    with pytest.warns(UserWarning, match="Not normalised, kept as they are") as warned:
        normalized, report = normalize_model(model, x, verbose=0, return_report=True)
    (text,) = (m for w in warned if "Not normalised" in (m := str(w.message)))
    for name in (
        *("subclass (OwnLSTM)", "holder (OwnLayer)", "cell (OwnCell)"),
        "dropping (GRU): batch-normalised layers have no dropout=1.0",
    ):
        assert name in text
    assert "ours" not in text and "plain" not in text
    assert gap(model(x), normalized(x)) <= 1e-5
    assert [type(a) for a in normalized.layers[:-1]] == [
        type(a) for a in model.layers[:-1]
    ]
    assert {entry.name: entry.normalized_into for entry in report} == {
        **dict.fromkeys(["subclass", "holder", "cell", "dropping", "ours"]),
        "plain": "BNLSTM",
    }
    reasons = {entry.name: entry.kept_because for entry in report}
    assert reasons["ours"] == "it is batch-normalised already"
    assert all(part.trainable for part in normalized.layers)
    # The layer that was normalised before keeps its statistics and its gamma.
    copy = normalized.get_layer("ours")
    for a, b in zip(copy.weights, normalized_already.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_normalised_model_is_copied(rng):
    model = sequential(keras_bnrnn.BNLSTM(U))
    randomize(model.layers[0], rng)
    x = frames(rng)
    copy, report = normalize_model(model, x, verbose=0, return_report=True)
    assert copy is not model and gap(copy(x), model(x)) == 0.0
    assert [entry.normalized_into for entry in report] == [None]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="of_a_class")
        self.rnn = layers.LSTM(U)

    def call(self, x):
        return self.rnn(x)


def test_refused(rng):
    x = frames(rng)
    model = sequential(stock("lstm"))
    subclassed = Subclassed()
    subclassed(x)
    with pytest.raises(ValueError, match=r"functional API.*'of_a_class'"):
        normalize_model(subclassed, x)
    with pytest.raises(ValueError, match=r"must be built.*'not_yet'"):
        normalize_model(keras.Sequential([stock("gru")], name="not_yet"), x)
    with pytest.raises(ValueError, match=r"recurrent layer.*'dense_only'"):
        dense = keras.Sequential(
            [keras.Input((D,)), layers.Dense(2)], name="dense_only"
        )
        normalize_model(dense, x)
    with pytest.raises(ValueError, match=r"statistics.*Received: dtype=.*, units=3"):
        normalize_model(model, x, dtype="float16", units=3)
    with pytest.raises(ValueError, match=r"`statistics`.*statistics='all'"):
        normalize_model(model, x, statistics="all")
    with pytest.raises(ValueError, match="at least one batch"):
        normalize_model(model, [], verbose=0)
    x[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"finite.*batch 1.*'lstm"):
        normalize_model(model, x, verbose=0)
