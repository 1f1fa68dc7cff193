"""`fold`: stock Keras layers only, and the same numbers."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import KINDS, gap, random_mask, randomize
from keras import layers

import keras_bnrnn
from keras_bnrnn import fold
from keras_bnrnn.traversal import sublayers

B, T, D, U = 4, 5, 3, 4
EACH = pytest.mark.parametrize("kind", KINDS)


def ours(kind, units=U, **arguments):
    arguments.setdefault("return_sequences", True)
    return KINDS[kind][0](units, **arguments)


def cell(kind, **arguments):
    return getattr(keras_bnrnn, KINDS[kind][0].__name__ + "Cell")(U, **arguments)


def frames(rng, *shape):
    return rng.normal(size=shape or (B, T, D)).astype("float32")


def randomized(model, rng):
    for layer in sublayers(model):
        if isinstance(layer, layers.Layer) and not isinstance(layer, keras.Model):
            randomize(layer, rng)
    return model


def is_ours(layer):
    return type(layer).__module__.split(".")[0] == "keras_bnrnn"


def flat(outputs):
    return keras.tree.flatten(outputs)


def names_of(model):
    """The names of all layers but the inputs', which have a test of their own."""
    return [x.name for x in model.layers if not isinstance(x, layers.InputLayer)]


def state_of(model):
    """All that must not change: weights, trainable flags, config, states."""
    weights = [np.asarray(w).copy() for w in model.variables]
    flags = [layer.trainable for layer in sublayers(model)]
    return weights, flags, model.get_config()


def check_fold(model, *inputs, at_most=1e-5, stock=True, randomized_by=None):
    """Folds; equal, stock, named alike, and the source as it was. Returns it."""
    if randomized_by is not None:
        randomized(model, randomized_by)
    weights, flags, config = state_of(model)
    folded, report = fold(model, return_report=True)
    for a, b in zip(model.variables, weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert state_of(model)[1:] == (flags, config)

    if stock:
        assert not [layer.name for layer in sublayers(folded) if is_ours(layer)]
        assert all(entry.kept_because is None for entry in report)
        assert {entry.name for entry in report} >= {
            layer.name
            for layer in sublayers(model)
            if isinstance(layer, tuple(ours for ours, _ in KINDS.values()))
        }
    assert type(folded) is type(model)
    assert folded.name == model.name
    assert names_of(folded) == names_of(model)
    if not isinstance(model, keras.Sequential):
        assert folded.output_names == model.output_names

    mine = {id(v) for v in model.variables}
    assert not [v.path for v in folded.variables if id(v) in mine]
    for x in inputs:
        expected, outputs = model(x, training=False), folded(x, training=False)
        keras.tree.assert_same_structure(expected, outputs)
        for a, b in zip(flat(expected), flat(outputs), strict=True):
            assert a.dtype == b.dtype
            assert np.max(np.abs(a)) > 1e-2
            assert gap(a, b) <= at_most
    return folded


# What folds


@EACH
def test_sequential(kind, rng):
    more = {"dropout": 0.3, "recurrent_dropout": 0.2, "kernel_regularizer": "l2"}
    model = keras.Sequential(
        [
            keras.Input((None, D)),
            ours(kind, **more, kernel_constraint="max_norm", momentum=0.7),
            layers.Dropout(0.5),
            keras_bnrnn.SequenceBatchNorm(),
            ours(kind, normalize="joint", statistics="frame", epsilon=0.1),
            keras_bnrnn.SequenceBatchNorm(center=False, scale=False, epsilon=0.2),
            ours(kind, use_bias=False, return_sequences=False),
            layers.Dense(2),
        ]
    )
    folded = check_fold(model, frames(rng), frames(rng, 1, 9, D), randomized_by=rng)
    stock = KINDS[kind][1]
    assert [type(layer) for layer in folded.layers] == [
        stock,
        layers.Dropout,
        layers.BatchNormalization,
        stock,
        layers.BatchNormalization,
        stock,
        layers.Dense,
    ]
    assert folded.layers[0].dropout == folded.layers[0].recurrent_dropout == 0.0
    assert folded.losses == []


@pytest.mark.parametrize("normalize", ["input", "joint"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_gru_both_ways_of_resetting(normalize, use_bias, rng):
    model = keras.Sequential([keras.Input((None, D))])
    for reset_after in (True, False):
        arguments = {"reset_after": reset_after, "normalize": normalize}
        model.add(ours("gru", use_bias=use_bias, **arguments))
    check_fold(model, frames(rng), randomized_by=rng)


@EACH
def test_arguments_are_carried_over(kind, rng):
    arguments = {
        "activation": "softsign",
        "go_backwards": True,
        "zero_output_for_mask": True,
    }
    if kind != "simple_rnn":
        arguments["recurrent_activation"] = "hard_sigmoid"
    x = keras.Input((T, D))
    outputs = ours(kind, **arguments)(layers.Masking(9.0)(x))
    data = np.where(random_mask(rng, B, T)[..., None], frames(rng), 9.0)
    check_fold(keras.Model(x, outputs), data.astype("float32"), randomized_by=rng)


@EACH
@pytest.mark.parametrize("as_cell", [False, True])
def test_arguments_of_training_are_left_out(as_cell, kind, rng):
    """The folded layer computes the same in training, and has no loss of its own."""
    arguments = {"use_bias": False, "dropout": 0.5, "recurrent_dropout": 0.5}
    for part in ("kernel", "recurrent", "bias"):
        arguments[f"{part}_regularizer"] = "l2"
        arguments[f"{part}_constraint"] = "non_neg"
    if as_cell:
        layer = layers.RNN(cell(kind, **arguments), return_sequences=True)
    else:
        arguments["activity_regularizer"] = "l2"
        layer = ours(kind, **arguments, unroll=True)
    model = keras.Sequential([keras.Input((T, D)), layer])
    x = frames(rng)
    folded = check_fold(model, x, randomized_by=rng)
    assert gap(folded(x, training=True), model(x, training=False)) <= 1e-5
    assert folded.losses == []
    stock = folded.layers[0] if not as_cell else folded.layers[0].cell
    assert stock.use_bias
    for part in ("kernel", "recurrent", "bias"):
        assert getattr(stock, f"{part}_regularizer") is None
        assert getattr(stock, f"{part}_constraint") is None
    assert folded.layers[0].unroll == (not as_cell)


@EACH
def test_functional_with_shared_layers_inputs_outputs_and_raw_ops(kind, rng):
    a, b = keras.Input((None, D), name="a"), keras.Input((None, D), name="b")
    shared = ours(kind, name="shared")
    one, other = shared(a), shared(b)
    mixed = keras.ops.tanh(one * 2.0) + keras.ops.flip(other, axis=1)
    last, *states = ours(kind, return_state=True, return_sequences=False)(mixed)
    again = ours(kind)(other, initial_state=states)
    by_name = {
        "last": layers.Dense(2, name="last")(last),
        "again": layers.Identity(name="again")(again),
        "states": keras.ops.concatenate(states),
    }
    data = [frames(rng), frames(rng)]
    as_dict = keras.Model({"a": a, "b": b}, by_name)
    folded = check_fold(as_dict, dict(zip("ab", data, strict=True)), randomized_by=rng)
    assert set(folded.output) == set(by_name)
    assert type(folded.get_layer("shared")) is KINDS[kind][1]
    assert len([w for w in folded.weights if "shared" in w.path]) == 3

    check_fold(keras.Model([a, b], [by_name["last"], again, one]), data)


def test_unrolled_bidirectional_with_a_mask(rng):
    """Stock layers of Keras 3.15 go wrong here: unrolled, backwards, zeros in padding.

    There `keras.layers.RNN` lays the mask over reversed outputs without reversing it.
    """
    x = keras.Input((T, D))
    layer = layers.Bidirectional(ours("gru", unroll=True))
    data = np.where(random_mask(rng, B, T)[..., None], frames(rng), 9.0)
    model = keras.Model(x, layer(layers.Masking(9.0)(x)))
    check_fold(model, data.astype("float32"), randomized_by=rng)


def test_names_of_inputs():
    named, unnamed = keras.Input((None, D), name="named"), keras.Input((None, D))
    model = keras.Model([named, unnamed], ours("gru")(named + unnamed))
    folded = fold(model)
    assert [x.name for x in folded.inputs] == [x.name for x in model.inputs]
    assert [x.name for x in folded.layers] == [x.name for x in model.layers]


@EACH
def test_nested_models(kind, rng):
    inner = keras.Sequential(
        [keras.Input((None, D)), ours(kind, name="deep"), layers.Dense(D)],
        name="inner",
    )
    x = keras.Input((None, D))
    middle = keras.Model(x, ours(kind, D)(inner(x)) + inner(x), name="middle")
    model = keras.Sequential([keras.Input((None, D)), middle, ours(kind)], name="outer")
    folded = check_fold(model, frames(rng), randomized_by=rng)
    copy = folded.get_layer("middle").get_layer("inner").get_layer("deep")
    assert type(copy) is KINDS[kind][1]

    functional = keras.Model(x, layers.Dense(2)(model(inner(x))))
    check_fold(functional, frames(rng))


@pytest.mark.parametrize(
    "kind, merge_mode", zip(KINDS, ["concat", "mul", "sum"], strict=True)
)
def test_bidirectional_and_masks(kind, merge_mode, rng):
    ids = rng.integers(0, 7, (B, T))  # zeros anywhere
    model = keras.Sequential(
        [
            keras.Input((None,)),
            layers.Embedding(7, D, mask_zero=True),
            layers.Bidirectional(ours(kind), merge_mode=merge_mode, name="both"),
            keras_bnrnn.SequenceBatchNorm(),
            layers.Bidirectional(
                ours("gru", name="gru"),
                backward_layer=ours("lstm", name="lstm", go_backwards=True),
            ),
            layers.Bidirectional(ours(kind, return_sequences=False)),
        ]
    )
    folded = check_fold(model, ids, randomized_by=rng)
    both = folded.get_layer("both")
    assert type(both.forward_layer) is type(both.backward_layer) is KINDS[kind][1]
    assert both.forward_layer.name == model.get_layer("both").forward_layer.name
    assert both.backward_layer.name == model.get_layer("both").backward_layer.name


@EACH
def test_bidirectional_in_which_one_direction_is_stock(kind, rng):
    backward = KINDS[kind][1](U, return_sequences=True, go_backwards=True)
    layer = layers.Bidirectional(ours(kind), backward_layer=backward)
    model = keras.Sequential([keras.Input((None, D)), layer])
    check_fold(model, frames(rng), randomized_by=rng)


@EACH
def test_time_distributed(kind, rng):
    model = keras.Sequential(
        [
            keras.Input((2, T, D)),
            layers.TimeDistributed(ours(kind)),
            layers.TimeDistributed(ours(kind, return_sequences=False)),
            layers.TimeDistributed(layers.Dense(2)),
        ]
    )
    check_fold(model, frames(rng, B, 2, T, D), randomized_by=rng)


def test_a_model_inside_time_distributed(rng):
    inner = keras.Sequential([keras.Input((T, D)), ours("lstm")])
    model = keras.Sequential(
        [keras.Input((2, T, D)), layers.TimeDistributed(inner), layers.Dense(2)]
    )
    check_fold(model, frames(rng, B, 2, T, D), randomized_by=rng)


@EACH
def test_cells(kind, rng):
    cells = [
        cell(kind),
        layers.LSTMCell(3),
        cell(kind, normalize="joint", use_bias=False, recurrent_dropout=0.3),
    ]
    model = keras.Sequential(
        [
            keras.Input((None, D)),
            layers.RNN(cell(kind), return_sequences=True),
            layers.Bidirectional(layers.RNN(cell(kind), return_sequences=True)),
            layers.RNN(layers.StackedRNNCells(cells), name="stack"),
        ]
    )
    folded = check_fold(model, frames(rng), randomized_by=rng)
    stock = getattr(layers, KINDS[kind][1].__name__ + "Cell")
    kinds = [type(c) for c in folded.get_layer("stack").cell.cells]
    assert kinds == [stock, layers.LSTMCell, stock]


@EACH
def test_stateful(kind, rng):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(B, T, D)),
            ours(kind, stateful=True),
            layers.Bidirectional(ours(kind, stateful=True)),
            layers.RNN(cell(kind), stateful=True),
        ]
    )
    randomized(model, rng)
    x = frames(rng)
    first = model(x)
    folded = fold(model)  # the states of the source, as they are now
    for _ in range(2):
        a, b = model(x), folded(x)
        assert gap(a, b) <= 1e-5
        assert gap(a, first) > 1e-3
    for layer in folded.layers:
        layer.reset_state()
    assert gap(folded(x), first) <= 1e-5


def test_stateful_stack_of_cells(rng):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(B, T, D)),
            layers.RNN([cell("gru"), cell("lstm")], stateful=True),
        ]
    )
    randomized(model, rng)
    x = frames(rng)
    model(x)
    folded = fold(model)
    for _ in range(2):
        assert gap(model(x), folded(x)) <= 1e-5


@EACH
def test_mixed_precision(kind, rng):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.Sequential(
            [
                keras.Input((None, D)),
                ours(kind),
                keras_bnrnn.SequenceBatchNorm(),
                ours(kind, dtype="float32"),
            ]
        )
    finally:
        keras.config.set_dtype_policy("float32")
    # bfloat16 has 8 bits: what two roundings of a value of 4 may be apart
    folded = check_fold(model, frames(rng), at_most=0.05, randomized_by=rng)
    policies = [layer.dtype_policy.name for layer in folded.layers]
    assert policies == ["mixed_bfloat16", "mixed_bfloat16", "float32"]
    assert {w.dtype for w in folded.weights} == {"float32"}


@EACH
def test_float64(kind, rng, float64):
    model = keras.Sequential(
        [keras.Input((None, D)), ours(kind), keras_bnrnn.SequenceBatchNorm()]
    )
    data = rng.normal(size=(B, T, D))
    check_fold(model, data, at_most=1e-12, randomized_by=rng)


def test_a_stock_model(rng):
    model = keras.Sequential(
        [
            keras.Input((None, D)),
            layers.Conv1D(4, 2, padding="same"),
            layers.BatchNormalization(),
            layers.Bidirectional(layers.LSTM(U, return_sequences=True)),
            layers.GRU(U),
        ]
    )
    folded = check_fold(model, frames(rng), at_most=0.0, randomized_by=rng)
    assert folded is not model


def test_folding_twice_and_after_training(rng):
    model = keras.Sequential([keras.Input((None, D)), ours("lstm"), layers.Dense(1)])
    model.compile("adam", "mse", run_eagerly=True)
    x = frames(rng)
    model.fit(x, x[..., :1], verbose=0)
    folded = check_fold(model, x)
    check_fold(folded, x, at_most=0.0)
    model.fit(x, x[..., :1], verbose=0)  # the source can go on
    assert gap(model(x), folded(x)) > 1e-5


@pytest.mark.parametrize("functional", [False, True])
def test_whatever_the_model_is_compiled_with(functional, rng):
    def gap_squared(y, outputs):
        return keras.ops.mean((y - outputs) ** 2, axis=-1)

    x = frames(rng)
    inner = keras.Sequential([keras.Input((None, D)), ours("lstm")], name="inner")
    inner.compile("adam", gap_squared)
    model = keras.Sequential([keras.Input((None, D)), inner, layers.Dense(1)])
    if functional:
        model = keras.Model(model.inputs[0], model.outputs[0])
    model.compile("adam", gap_squared)
    folded = check_fold(model, x, randomized_by=rng)
    assert model.compiled and inner.compiled and not folded.compiled
    model.compile("adam", "mse", jit_compile=False)
    # Means of float32 squares: 1e-5.
    assert fold(model).evaluate(x, x[..., :1], verbose=0) == pytest.approx(
        model.evaluate(x, x[..., :1], verbose=0), rel=1e-5
    )


def test_frozen_layers(rng):
    model = keras.Sequential(
        [keras.Input((None, D)), ours("gru", trainable=False), ours("lstm")]
    )
    model.layers[1].trainable = False
    check_fold(model, frames(rng), randomized_by=rng)
    assert not any(layer.trainable for layer in model.layers)


# What does not


@pytest.mark.parametrize("inside", [False, True])
def test_peepholes_are_kept_frozen(inside, rng):
    layer = ours("lstm", peephole=True, name="peeping", dropout=0.2)
    model = keras.Sequential(
        [
            keras.Input((None, D)),
            ours("lstm", name="plain"),
            layers.Bidirectional(layer, name="both") if inside else layer,
        ]
    )
    randomized(model, rng)
    with pytest.warns(UserWarning, match=r"kept frozen.*peeping.*BNLSTM.*peephole"):
        folded = check_fold(model, frames(rng), stock=False)
    with pytest.warns(UserWarning, match="peeping"):
        _, report = fold(model, return_report=True)
    names = ["forward_peeping", "backward_peeping"] if inside else ["peeping"]
    assert [entry.name for entry in report] == ["plain", *names]
    assert report[0][1:] == ("BNLSTM", "LSTM", None)
    for entry in report[1:]:
        assert entry.folded_into is None and "peephole" in entry.kept_because
    assert [x.name for x in sublayers(folded) if isinstance(x, layers.LSTM)] == [
        "plain"
    ]
    kept = [x for x in sublayers(folded) if type(x) is keras_bnrnn.BNLSTM]
    assert [x.name for x in kept] == names
    assert all(not x.trainable and not x.trainable_weights for x in kept)
    # frozen: training=True normalises as inference does
    before = folded.get_weights()
    folded(frames(rng), training=True)
    for a, b in zip(folded.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


@keras.saving.register_keras_serializable(package="tests")
class OfOnesOwn(layers.Layer):
    """A user's layer that calls a normalised one in its own way."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras_bnrnn.BNGRU(D, return_sequences=True)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x) + x


def test_layers_inside_a_layer_of_ones_own_are_kept(rng):
    model = keras.Sequential([keras.Input((None, D)), OfOnesOwn(name="own")])
    randomized(model, rng)
    with pytest.warns(UserWarning, match=r"own \(OfOnesOwn\)"):
        folded = check_fold(model, frames(rng), stock=False)
    assert not folded.get_layer("own").trainable


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="of_a_class")
        self.rnn = keras_bnrnn.BNLSTM(U)

    def call(self, x):
        return self.rnn(x)


def test_refused(rng):
    unbuilt = keras.Sequential([ours("lstm")], name="not_yet")
    with pytest.raises(ValueError, match=r"built.*'not_yet'"):
        fold(unbuilt)
    subclassed = Subclassed()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'of_a_class' of class Subclassed"):
            fold(subclassed)
        subclassed(frames(rng))
    nested = keras.Sequential([keras.Input((None, D)), subclassed], name="holder")
    with pytest.raises((TypeError, ValueError), match=r"Subclassed"):
        fold(nested)  # nothing to revive it from
    with pytest.raises(ValueError, match=r"model=<BNLSTM"):
        fold(ours("lstm"))


def test_a_sequential_model_built_by_its_first_call(rng):
    model = keras.Sequential([ours("lstm"), layers.Dense(1)])
    model(frames(rng))
    check_fold(model, frames(rng), randomized_by=rng)


# Saving

WITHOUT = """
import sys
sys.modules["keras_bnrnn"] = None
import keras, numpy as np
model = keras.models.load_model(sys.argv[1])
data = np.load(sys.argv[2])
np.save(sys.argv[3], model([data["a"], data["b"]]))
assert not any(name.startswith("keras_bnrnn.") for name in sys.modules)
"""


@pytest.mark.slow
def test_a_folded_model_loads_where_the_package_is_not(rng, tmp_path):
    a, b = keras.Input((None, D)), keras.Input((None, D))
    inner = keras.Sequential([keras.Input((None, D)), ours("simple_rnn")])
    merged = layers.Bidirectional(ours("gru"))(inner(a)) + ours("lstm", 2 * U)(b)
    merged = keras_bnrnn.SequenceBatchNorm()(merged)
    outputs = layers.RNN([cell("lstm"), layers.GRUCell(2)])(merged)
    model = randomized(keras.Model([a, b], outputs), rng)
    data = {"a": frames(rng), "b": frames(rng)}
    folded = fold(model)
    folded.save(tmp_path / "folded.keras")
    np.savez(tmp_path / "data.npz", **data)
    paths = [tmp_path / n for n in ("folded.keras", "data.npz", "out.npy")]
    subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, paths)],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    outputs = np.load(tmp_path / "out.npy")
    np.testing.assert_array_equal(outputs, folded(list(data.values())))
    assert gap(outputs, model(list(data.values()))) <= 1e-5


@keras.saving.register_keras_serializable(package="test_folding")
class Scaled(keras.layers.Wrapper):
    """A wrapper with a weight of its own."""

    def build(self, input_shape):
        super().build(input_shape)
        self.factor = self.add_weight(shape=(), name="factor")

    def call(self, x):
        return self.factor * self.layer(x)


def test_wrappers_keep_weights_of_their_own(rng):
    x = frames(rng, B, T, D)
    plain = keras.Sequential(
        [keras.Input((None, D)), Scaled(keras.layers.Dense(2)), keras_bnrnn.BNLSTM(U)]
    )
    check_fold(plain, x, randomized_by=rng)
    around = keras.Sequential([keras.Input((None, D)), Scaled(keras_bnrnn.BNLSTM(U))])
    for layer in sublayers(around):
        randomize(layer, rng)
    with pytest.warns(UserWarning, match="Scaled"):
        folded, report = fold(around, return_report=True)
    assert [(entry.layer, entry.folded_into) for entry in report] == [("Scaled", None)]
    assert gap(folded(x), around(x)) <= 1e-6  # the same weights


def test_lambda_layers_are_taken_along(rng):
    model = keras.Sequential(
        [
            keras.Input((None, D)),
            keras.layers.Lambda(lambda x: 2.0 * x),
            keras_bnrnn.BNGRU(U),
        ]
    )
    check_fold(model, frames(rng, B, T, D), randomized_by=rng)
