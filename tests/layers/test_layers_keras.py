"""The layers as Keras layers: arguments, training, wrappers, saving, XLA, refusals."""

import doctest
import functools
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import KINDS, gap, random_mask, randomize

import keras_bnrnn
from keras_bnrnn.layers import BNRNN
from keras_bnrnn.projection import moments_are_cheaper

B, T, D, U = 6, 5, 3, 4
EACH = pytest.mark.parametrize("kind", KINDS)
# Everything that decides what a training step computes.
VARIANTS = (
    {},
    {"statistics": "frame"},
    {"normalize": "joint"},
    {"normalize": "joint", "statistics": "frame"},
)


def make(kind, rng=None, shape=(None, None, D), **arguments):
    """A built layer; with `rng`, one of random weights."""
    layer = KINDS[kind][0](arguments.pop("units", U), **arguments)
    layer.build(shape)
    if rng is not None:
        randomize(layer, rng)
    return layer


def frames(rng, *shape):
    return rng.normal(size=shape or (B, T, D)).astype("float32")


def copy_of(layer, **changes):
    """A layer of the same arguments and weights, but for `changes`."""
    config = {**layer.get_config(), **changes}
    copy = type(layer).from_config(config)
    copy.build((None, None, D))
    copy.set_weights(layer.get_weights())
    return copy


def toy_model(kind, **arguments):
    """A model that `toy_task` can teach."""
    layer = KINDS[kind][0](8, name="rnn", **arguments)
    return keras.Sequential([keras.Input((None, D)), layer, keras.layers.Dense(1)])


def toy_task(rng, rows=64):
    """Frames, and the first feature of the last of them to be told."""
    x = rng.normal(1.0, 2.0, (rows, T, D)).astype("float32")
    return x, x[:, -1, :1] - 1.0


def values(variables):
    return {v.path: keras.ops.convert_to_numpy(v).copy() for v in variables}


def check_learns(model, data, epochs=6, **compile_arguments):
    """Fits; the loss goes down, and every kind of weight moves."""
    optimizer = keras.optimizers.SGD(0.1)
    model.compile(optimizer, "mse", **compile_arguments)
    before = values(model.weights)
    losses = model.fit(*data, epochs=epochs, verbose=0).history["loss"]
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.9 * losses[0]
    for path, value in values(model.weights).items():
        assert np.all(np.isfinite(value)), path
        assert np.any(value != before[path]), path


# Arguments


@EACH
@pytest.mark.parametrize("suffix", ["", "Cell"])
def test_arguments_and_defaults_are_those_of_keras(kind, suffix):
    ours, stock = (
        inspect.signature(getattr(module, cls.__name__ + suffix)).parameters
        for module, cls in zip((keras_bnrnn, keras.layers), KINDS[kind], strict=True)
    )

    def positional(parameters):
        return [
            (p.name, p.default)
            for p in parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

    assert positional(ours) == positional(stock)
    own = {p.name for p in ours.values() if p.kind is p.KEYWORD_ONLY}
    assert own >= set(OWN)


OWN = {
    "normalize": "joint",
    "statistics": "frame",
    "momentum": 0.5,
    "epsilon": 0.25,
    "gamma_initializer": keras.initializers.Constant(0.1),
    "synchronized": True,
}
NOT_DEFAULT = {
    **OWN,
    "units": 7,
    "activation": "relu",
    "recurrent_activation": "hard_sigmoid",
    "use_bias": False,
    "kernel_initializer": keras.initializers.RandomNormal(0.5, 0.1, seed=1),
    "recurrent_initializer": keras.initializers.RandomUniform(-0.1, 0.3, seed=2),
    "bias_initializer": keras.initializers.Constant(0.7),
    "unit_forget_bias": False,
    "kernel_regularizer": keras.regularizers.L1(0.1),
    "recurrent_regularizer": keras.regularizers.L2(0.2),
    "bias_regularizer": keras.regularizers.L2(0.3),
    "activity_regularizer": keras.regularizers.L1(0.4),
    "kernel_constraint": keras.constraints.MaxNorm(5.0),
    "recurrent_constraint": keras.constraints.MaxNorm(6.0),
    "bias_constraint": keras.constraints.NonNeg(),
    "dropout": 0.1,
    "recurrent_dropout": 0.2,
    "seed": 3,
    "return_sequences": True,
    "return_state": True,
    "go_backwards": True,
    "stateful": True,
    "unroll": True,
    "reset_after": False,
    "use_cudnn": False,
    "peephole": True,
    # of the base classes, by keyword
    "zero_output_for_mask": True,
    "name": "called_so",
    "trainable": False,
    "dtype": "mixed_bfloat16",
}
ONE_VALUE_ONLY = {"population", "max_timesteps"}


@EACH
@pytest.mark.parametrize("suffix", ["", "Cell"])
def test_config_round_trip(kind, suffix):
    cls = getattr(keras_bnrnn, KINDS[kind][0].__name__ + suffix)
    parameters = inspect.signature(cls).parameters
    names = set(parameters) - {"kwargs"}
    assert names - ONE_VALUE_ONLY <= set(NOT_DEFAULT)
    named = {n: v for n, v in NOT_DEFAULT.items() if n in names}
    assert all(v != parameters[n].default for n, v in named.items())
    base = ["name", "trainable", "dtype"] + ["zero_output_for_mask"] * (not suffix)
    given = {**named, **{n: NOT_DEFAULT[n] for n in base}}

    for refused_together in ("normalize", "synchronized"):
        arguments = {n: v for n, v in given.items() if n != refused_together}
        layer = cls(**arguments)
        config = layer.get_config()
        assert set(config) >= names
        for name, value in arguments.items():
            expected = value
            if name == "dtype":
                expected = keras.saving.serialize_keras_object(layer.dtype_policy)
                assert layer.dtype_policy.name == value
            elif not isinstance(value, (str, bool, int, float)):
                expected = keras.saving.serialize_keras_object(value)
            assert config[name] == expected, name

        text = json.dumps(keras.saving.serialize_keras_object(layer))
        for copy in (
            cls.from_config(config),
            keras.saving.deserialize_keras_object(json.loads(text)),
        ):
            assert type(copy) is cls
            assert copy.get_config() == config
            norm = getattr(copy, "cell", copy).input_norm
            assert not norm.trainable
            assert norm.beta_constraint is None or norm.center is False
            assert norm.dtype_policy.name == "mixed_bfloat16"


@EACH
def test_defaults_round_trip(kind):
    config = KINDS[kind][0](2).get_config()
    assert KINDS[kind][0].from_config(config).get_config() == config
    assert "cell" not in config


# Training


@pytest.mark.slow(
    but=["True-variant0-simple_rnn", "False-variant1-lstm", "auto-variant2-gru"]
)
@EACH
@pytest.mark.parametrize(
    "jit_compile, variant", [(True, VARIANTS[0]), (False, VARIANTS[1]), ("auto", {})]
)
def test_fit(kind, jit_compile, variant, rng):
    model = toy_model(kind, **variant)
    check_learns(model, toy_task(rng), jit_compile=jit_compile)


@pytest.mark.slow(but=["gru"])
@EACH
def test_fit_run_eagerly(kind, rng):
    model = toy_model(kind, normalize="joint")
    check_learns(model, toy_task(rng), epochs=4, run_eagerly=True)


@pytest.mark.slow(but=["lstm-False"])
@pytest.mark.parametrize(
    "kind, jit_compile",
    [("simple_rnn", False), ("lstm", False), ("gru", False), ("simple_rnn", True)],
)
def test_fit_on_ragged_batches_of_any_length(kind, jit_compile, rng):
    shapes = [(8, 5, D), (8, 5, D), (3, 7, D)]
    batches = [(x, x[:, -1, :1]) for x in (frames(rng, *s) for s in shapes)]
    specs = (tf.TensorSpec((None, None, D)), tf.TensorSpec((None, 1)))
    data = tf.data.Dataset.from_generator(lambda: batches, output_signature=specs)
    check_learns(toy_model(kind), [data], epochs=10, jit_compile=jit_compile)


@pytest.mark.slow(but=["mixed_float16-gru", "mixed_bfloat16-lstm"])
@EACH
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(kind, policy, rng):
    keras.config.set_dtype_policy(policy)
    try:
        model = toy_model(kind)
    finally:
        keras.config.set_dtype_policy("float32")
    layer = model.get_layer("rnn")
    check_learns(model, toy_task(rng), run_eagerly=kind != "lstm", jit_compile=False)
    assert {w.dtype for w in layer.weights} == {"float32"}
    x = frames(rng) + 100.0
    assert layer(x).dtype == policy.removeprefix("mixed_")
    expected = copy_of(layer, dtype="float32", name="in_float32")(x)
    assert gap(layer(x), expected) < 0.15


# Wrappers and stacks


@pytest.mark.slow(but=["True-simple_rnn", "False-lstm"])
@EACH
@pytest.mark.parametrize("sequences", [True, False])
def test_bidirectional(kind, sequences, rng):
    x, mask = frames(rng), random_mask(rng, B, T)
    merges = {
        "concat": lambda a, b: np.concatenate([a, b], axis=-1),
        "sum": np.add,
        "mul": np.multiply,
        "ave": lambda a, b: (a + b) / 2,
        None: lambda a, b: (a, b),
    }
    inner = make(kind, return_sequences=sequences)
    for merge_mode, merge in merges.items():
        layer = keras.layers.Bidirectional(inner, merge_mode=merge_mode)
        layer.build((None, None, D))
        randomize(layer, rng)
        for m in (None, mask):
            one = np.asarray(layer.forward_layer(x, mask=m))
            other = np.asarray(layer.backward_layer(x, mask=m))
            if sequences:
                other = other[:, ::-1]
            expected = merge(one, other)
            assert gap(np.stack(layer(x, mask=m)), np.stack(expected)) <= 1e-6
    assert np.all(np.isfinite(np.stack(layer(x, mask=mask, training=True))))


def test_bidirectional_with_a_backward_layer_fits(rng):
    layer = keras.layers.Bidirectional(
        keras_bnrnn.BNGRU(4, return_sequences=True),
        backward_layer=keras_bnrnn.BNLSTM(
            4, return_sequences=True, go_backwards=True, normalize="joint"
        ),
    )
    model = keras.Sequential(
        [
            keras.Input((None, D)),
            layer,
            keras_bnrnn.BNSimpleRNN(4),
            keras.layers.Dense(1),
        ]
    )
    x = frames(rng)
    check_learns(model, toy_task(rng), jit_compile=False)
    half = np.asarray(layer.backward_layer(x))[:, ::-1]
    assert layer(x).shape == (B, T, 8)
    assert gap(layer(x)[..., 4:], half) <= 1e-6


@pytest.mark.slow(but=["simple_rnn"])
@EACH
def test_masks_of_embedding_and_masking(kind, rng):
    """Padding has no effect: each row alone, cut to its length, says the same."""
    lengths = [2, 4, 1, 5]
    ids = np.zeros((4, 7), "int32")
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.integers(1, 9, length)

    def recurrent():
        inner = KINDS[kind][0](3, return_sequences=True)
        return [keras.layers.Bidirectional(inner), KINDS[kind][0](4)]

    embedded = keras.Sequential(
        [keras.Input((None,)), keras.layers.Embedding(9, D, mask_zero=True)]
        + recurrent()
    )
    masking = keras.Sequential(
        [keras.Input((None, D)), keras.layers.Masking(-1.0)] + recurrent()
    )
    x = np.where(ids[..., None] > 0, rng.normal(size=(4, 7, D)), -1.0)
    for model, data in ((embedded, ids), (masking, x.astype("float32"))):
        for layer in model.layers:
            randomize(layer, rng)
        for row, length in enumerate(lengths):
            alone = model(data[row : row + 1, :length])
            assert gap(model(data)[row], alone[0]) <= 1e-6
        # and in training: twice the padding, the same outputs and statistics
        before = model.get_weights()
        outputs = model(data[:, :5], training=True)
        after = model.get_weights()
        model.set_weights(before)
        assert gap(model(data, training=True), outputs) <= 1e-6
        for a, b in zip(model.get_weights(), after, strict=True):
            assert gap(a, b) <= 1e-6


@pytest.mark.slow(but=["simple_rnn"])
@EACH
def test_time_distributed(kind, rng):
    layer = make(kind, rng)
    wrapped = keras.layers.TimeDistributed(layer)
    x = frames(rng, B, 2, T, D)
    model = keras.Sequential([keras.Input((2, T, D)), wrapped, keras.layers.Dense(1)])
    expected = np.stack([layer(x[:, i]) for i in range(2)], axis=1)
    assert gap(wrapped(x), expected) <= 1e-6
    check_learns(model, (x, x[:, :, -1, :1]), epochs=8, run_eagerly=True)


@pytest.mark.slow
def test_cells_in_rnn_and_stacked_cells_fit(rng):
    cells = [
        keras_bnrnn.BNSimpleRNNCell(4),
        keras.layers.GRUCell(3),
        keras_bnrnn.BNLSTMCell(4, normalize="joint", recurrent_dropout=0.1),
        keras_bnrnn.BNGRUCell(4, dropout=0.1),
    ]
    model = keras.Sequential(
        [
            keras.Input((None, D)),
            keras.layers.RNN(keras_bnrnn.BNGRUCell(4), return_sequences=True),
            keras.layers.RNN(cells),
            keras.layers.Dense(1),
        ]
    )
    check_learns(model, toy_task(rng), epochs=10, jit_compile=False)


# States and directions


@EACH
def test_stateful(kind, rng):
    layer = make(kind, rng, (B, None, D), stateful=True, return_sequences=True)
    x = frames(rng, B, 9, D)
    whole = copy_of(layer, stateful=False)(x)
    halves = [layer(x[:, :4]), layer(x[:, 4:])]
    assert gap(np.concatenate(halves, axis=1), whole) <= 1e-6
    assert gap(layer(x), whole) > 1e-3
    layer.reset_state()
    assert gap(layer(x), whole) <= 1e-6

    layer.reset_state()
    layer(x, training=True)
    assert all(np.any(np.asarray(state) != 0) for state in layer.states)


def test_stateful_fit(rng):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(8, T, D)),
            keras_bnrnn.BNLSTM(8, stateful=True, return_sequences=True),
            keras_bnrnn.BNGRU(8, stateful=True),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    fitted = model.fit(
        *toy_task(rng, 32), batch_size=8, epochs=4, shuffle=False, verbose=0
    ).history["loss"]
    assert fitted[-1] < 0.9 * fitted[0]
    assert np.any(np.asarray(model.layers[1].states[0]) != 0)
    model.layers[0].reset_state()
    assert np.all(np.asarray(model.layers[0].states[1]) == 0)


@pytest.mark.slow(but=["lstm"])
@EACH
def test_encoder_decoder(kind, rng, tmp_path):
    """States returned by one layer start another, as Keras tensors."""
    source, target = keras.Input((None, D)), keras.Input((None, 2))
    encoder = KINDS[kind][0](U, return_state=True)
    decoder = KINDS[kind][0](U, return_sequences=True)
    _, *states = encoder(source)
    outputs = keras.layers.Dense(1)(decoder(target, initial_state=states))
    model = keras.Model([source, target], outputs)
    x, y = frames(rng), frames(rng, B, 4, 2)
    check_learns(
        model, ([x, y], y[..., :1] + x[:, -1:, :1]), epochs=8, run_eagerly=True
    )

    last, *states = encoder(x)
    assert gap(last, states[0]) <= 1e-6
    direct = model.layers[-1](decoder(y, initial_state=states))
    assert gap(model([x, y]), direct) <= 1e-6
    assert gap(decoder(y), decoder(y, initial_state=states)) > 1e-3

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded([x, y]), model([x, y]))


@EACH
def test_go_backwards(kind, rng):
    backward = make(kind, rng, return_sequences=True, go_backwards=True)
    forward = copy_of(backward, go_backwards=False)
    x, mask = frames(rng), random_mask(rng, B, T)
    for training in (False, True):
        for m in (None, mask):
            outputs = backward(x, mask=m, training=training)
            flipped = None if m is None else m[:, ::-1].copy()
            expected = forward(x[:, ::-1].copy(), mask=flipped, training=training)
            assert gap(outputs, expected) <= 1e-6


@pytest.mark.slow(but=["gru"])
@EACH
def test_unroll_equals_the_loop(kind, rng):
    x, mask = frames(rng), random_mask(rng, B, T)
    for variant in (VARIANTS[0], VARIANTS[2]):
        loop = make(kind, rng, return_sequences=True, return_state=True, **variant)
        unrolled = copy_of(loop, unroll=True)
        for training in (False, True):
            results = [
                outputs_and_gradients(layer, x, mask, training)
                for layer in (loop, unrolled)
            ]
            for a, b in zip(*results, strict=True):
                assert gap(a, b) <= 1e-6
        for a, b in zip(loop.get_weights(), unrolled.get_weights(), strict=True):
            assert gap(a, b) <= 1e-6  # the statistics moved alike


def outputs_and_gradients(layer, x, mask, training):
    """All outputs of a layer, and the gradients in x and its trainable weights."""
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = layer(x, mask=mask, training=training)
        loss = sum(tf.reduce_sum(tf.sin(3.0 * o)) for o in tf.nest.flatten(outputs))
    sources = [x] + [w.value for w in layer.trainable_weights]
    return tf.nest.flatten(outputs) + tape.gradient(loss, sources)


# Dropout


@pytest.mark.slow(but=["dropout-simple_rnn", "dropout-gru", "recurrent_dropout-lstm"])
@EACH
@pytest.mark.parametrize("rate", ["dropout", "recurrent_dropout"])
def test_dropout(kind, rate, rng):
    layer = make(kind, rng, return_sequences=True, seed=11, **{rate: 0.5})
    x = frames(rng)
    plain = copy_of(layer, **{rate: 0.0})
    assert gap(layer(x), plain(x)) == 0.0
    assert gap(layer(x), layer(x)) == 0.0
    twins = [copy_of(layer), copy_of(layer)]
    first, second = ([twin(x, training=True) for _ in range(2)] for twin in twins)
    assert gap(first, second) == 0.0
    assert gap(first[0], first[1]) > 1e-3
    other_seed = copy_of(layer, seed=12)
    assert gap(other_seed(x, training=True), first[0]) > 1e-3


@EACH
def test_the_dropout_mask_is_constant_over_time(kind, rng):
    """What is dropped has a gradient of exactly 0 at every timestep."""
    layer = make(kind, rng, (None, None, 9), dropout=0.5, return_sequences=True)
    layer.trainable = False
    x = tf.convert_to_tensor(frames(rng, B, T, 9))
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.square(layer(x, training=True)))
    dropped = tape.gradient(loss, x).numpy() == 0.0  # (B, T, D)
    np.testing.assert_array_equal(dropped, np.repeat(dropped[:, :1], T, axis=1))
    assert 0.2 < dropped.mean() < 0.8
    assert np.any(dropped[0] != dropped[1])


@pytest.mark.parametrize(
    "kind, arguments",
    [("simple_rnn", {}), ("lstm", {}), ("gru", {}), ("gru", {"reset_after": False})],
)
def test_the_recurrent_dropout_mask_is_constant_over_time(kind, arguments, rng):
    """A dropped unit never reaches the recurrent product: a row without gradient."""
    layer = make(kind, rng, units=12, recurrent_dropout=0.5, **arguments)
    # Frozen by its normalisation alone, so that one row can train.
    layer.input_norm.trainable = False
    with tf.GradientTape() as tape:
        outputs = layer(frames(rng, 1, 8, D), training=True)
        loss = tf.reduce_sum(tf.square(outputs))
    gradient = tape.gradient(loss, layer.cell.recurrent_kernel.value).numpy()
    if "reset_after" in arguments:
        # The reset gate of a dropped unit has nothing to reset: no gradient either.
        gradient = np.delete(gradient, slice(12, 24), axis=1)
    dropped = np.all(gradient == 0.0, axis=1)  # (U,)
    assert 2 <= dropped.sum() <= 10
    np.testing.assert_array_equal(np.any(gradient == 0.0, axis=1), dropped)


# Weights and saving


@pytest.mark.slow(but=["simple_rnn"])
@EACH
def test_saved_and_cloned_models_go_on_the_same(kind, rng, tmp_path):
    def loaded_weights(model):
        model.save_weights(tmp_path / "model.weights.h5")
        copy = keras.Sequential.from_config(model.get_config())
        copy.load_weights(tmp_path / "model.weights.h5")
        return copy

    def loaded(model):
        model.save(tmp_path / "model.keras")
        return keras.models.load_model(tmp_path / "model.keras")

    def cloned(model):
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        return copy

    inner = KINDS[kind][0](3, return_sequences=True)
    model = keras.Sequential(
        [
            keras.Input((None, D)),
            keras.layers.Bidirectional(inner),
            KINDS[kind][0](4, statistics="frame", momentum=0.6),
            keras.layers.Dense(1),
        ]
    )
    x, y = toy_task(rng, B)
    sgd = {"optimizer": "sgd", "loss": "mse", "run_eagerly": True}
    model.compile(**sgd)
    for _ in range(3):
        model.train_on_batch(x, y)
    counts = [w for w in model.weights if w.path.endswith("update_count")]
    assert [int(w) for w in counts] == [3, 3, 3]

    copies = [make_copy(model) for make_copy in (loaded_weights, loaded, cloned)]
    expected = np.asarray(model(x))
    model.train_on_batch(x, y)
    for copy in copies:
        np.testing.assert_array_equal(copy(x), expected)
        copy.compile(**sgd)
        copy.train_on_batch(x, y)
        for a, b in zip(copy.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


@EACH
def test_get_and_set_weights_and_summary(kind, rng):
    layer, other = make(kind, rng, return_state=True), make(kind, return_state=True)
    x = frames(rng)
    assert gap(layer(x)[0], other(x)[0]) > 1e-3
    other.set_weights(layer.get_weights())
    for a, b in zip(layer(x), other(x), strict=True):
        np.testing.assert_array_equal(a, b)

    lines = []
    model = toy_model(kind)
    model.summary(print_fn=lines.append)
    text = "\n".join(map(str, lines))
    gates = {"simple_rnn": 1, "lstm": 4, "gru": 3}[kind]
    width = gates * 8
    trainable = (D + 8 + 2) * width + (width if kind == "gru" else 0)
    assert KINDS[kind][0].__name__ in text
    assert model.get_layer("rnn").count_params() == trainable + 2 * width + 1
    assert f"{model.count_params():,}" in text


@EACH
def test_regularizers_add_losses(kind, rng):
    l2 = keras.regularizers.L2
    layer = make(
        kind,
        rng,
        kernel_regularizer=l2(0.1),
        recurrent_regularizer=l2(0.2),
        bias_regularizer=l2(0.3),
        activity_regularizer=l2(0.4),
    )
    outputs = layer(frames(rng))
    cell = layer.cell
    bias = [cell.input_norm.beta] + ([cell.recurrent_bias] if kind == "gru" else [])
    terms = [(0.1, cell.kernel), (0.2, cell.recurrent_kernel), (0.4 / B, outputs)]
    terms += [(0.3, b) for b in bias]
    expected = sum(factor * np.sum(np.asarray(w) ** 2) for factor, w in terms)
    assert len(layer.losses) == len(terms)
    assert sum(map(float, layer.losses)) == pytest.approx(expected, rel=1e-5)


@EACH
def test_constraints_apply(kind, rng):
    model = toy_model(
        kind,
        kernel_constraint=keras.constraints.MaxNorm(0.1),
        recurrent_constraint=keras.constraints.MaxNorm(0.2),
        bias_constraint=keras.constraints.MaxNorm(0.3, axis=0),
    )
    cell = model.get_layer("rnn").cell
    randomize(cell, rng)
    model.compile("sgd", "mse", run_eagerly=True)
    model.train_on_batch(*toy_task(rng, B))
    bias = [cell.input_norm.beta] + ([cell.recurrent_bias] if kind == "gru" else [])
    pairs = [(cell.kernel, 0.1), (cell.recurrent_kernel, 0.2)]
    for weight, bound in pairs + [(b, 0.3) for b in bias]:
        norms = np.sqrt(np.sum(np.asarray(weight) ** 2, axis=0))
        assert np.max(norms) <= bound * (1 + 1e-5)
        assert np.max(norms) >= 0.5 * bound


def test_unit_forget_bias():
    beta = np.asarray(make("lstm", bias_initializer="zeros").input_norm.beta)
    expected = np.repeat([0.0, 1.0, 0.0, 0.0], U)
    np.testing.assert_array_equal(beta, expected)
    other = make("lstm", bias_initializer=keras.initializers.Constant(0.5))
    np.testing.assert_array_equal(other.input_norm.beta, (1 + expected) / 2)
    without = make("lstm", unit_forget_bias=False)
    np.testing.assert_array_equal(without.input_norm.beta, 0 * expected)


@pytest.mark.slow(but=["gru"])
@EACH
def test_use_bias_false(kind, rng):
    layer = make(kind, rng, use_bias=False)
    assert layer.input_norm.beta is None
    assert not any("beta" in w.path or "bias" in w.path for w in layer.weights)
    # Without a bias, frames at the mean leave the state of zeros as it is.
    mean = np.asarray(layer.input_norm.moving_mean) * 0.0
    layer.input_norm.moving_mean.assign(mean)
    assert np.all(np.asarray(layer(np.zeros((2, T, D), "float32"))) == 0.0)
    model = toy_model(kind, use_bias=False)
    check_learns(model, toy_task(rng), epochs=4, run_eagerly=True)


# XLA


@pytest.mark.slow
@EACH
@pytest.mark.parametrize(
    "variant",
    VARIANTS[:3],  # "joint" takes no notice of `statistics`
    ids=["sequence", "frame", "joint"],
)
def test_jit_compile_agrees_with_the_graph(kind, variant, rng):
    """Inference and training in one program, of dynamic shape, with a mask."""
    layer = make(kind, rng, return_sequences=True, **variant)
    start = layer.get_weights()

    def step(x, mask):
        inference = layer(x, mask=mask)
        results = outputs_and_gradients(layer, x, mask, True)
        moved = [w.value for w in layer.non_trainable_weights]
        return tf.nest.flatten([inference, results, moved])

    signature = [tf.TensorSpec((None, None, D)), tf.TensorSpec((None, None), tf.bool)]
    graph, xla = (
        tf.function(step, input_signature=signature, jit_compile=jit)
        for jit in (False, True)
    )
    x, mask = tf.constant(frames(rng, 12, T, D)), tf.constant(random_mask(rng, 12, T))
    results = []
    for function in (graph, xla):
        layer.set_weights(start)
        results.append([np.asarray(a) for a in function(x, mask)])
    for a, b in zip(*results, strict=True):
        assert np.all(np.isfinite(a))
        assert gap(a, b) <= 1e-5 * max(1.0, np.max(np.abs(a)))


@pytest.mark.slow(but=["input-simple_rnn", "input-gru", "joint-lstm"])
@EACH
@pytest.mark.parametrize("normalize", ["input", "joint"])
def test_the_xla_program_is_two_loops_whatever_the_length(kind, normalize, rng):
    features = 37  # a number that nothing else in the program has
    shape = (None, None, features)
    layer = make(kind, rng, shape, normalize=normalize, return_sequences=True)

    @tf.function(
        jit_compile=True,
        input_signature=[tf.TensorSpec(shape), tf.TensorSpec(shape[:2], tf.bool)],
    )
    def step(x, mask):
        return outputs_and_gradients(layer, x, mask, True)

    def hlo(timesteps):
        x = tf.constant(frames(rng, 5, timesteps, features))
        mask = tf.constant(random_mask(rng, 5, timesteps))
        return step.experimental_get_compiler_ir(x, mask)(stage="hlo")

    short, long = hlo(5), hlo(50)
    assert short.count(" = ") == long.count(" = ") > 100
    for text in (short, long):
        assert text.count(" while(") == 2
        assert "callback" not in text.lower()

    inside, outside = products(long)
    assert inside
    assert not [line for line in inside if features in shapes_in(line)]
    if normalize == "input":  # the recurrent product and its gradient in the output
        assert len(inside) == 2

    # Over all frames: the input projection, its gradients in x and in the kernel,
    # and no more. Sequence-wise statistics from moments add what is of size (D, D):
    # the covariance, its product with the kernel, and a gradient of each. The mean of
    # the projection, that of the frames times the kernel, is a sum. They are also in a
    # condition, for moments that cancel. Its other branch projects the frames and
    # multiplies them by the projection, for the gradient in the kernel. The gradient in
    # x projects again: what a branch keeps costs time in steps that do not take it.
    outside = [line for line in outside if features in shapes_in(line)]
    of_moments = [line for line in outside if "[37,37]" in line]
    cheaper = moments_are_cheaper(shape, layer.cell.kernel.shape[-1])
    by_moments = normalize == "input" and cheaper
    assert len(outside) - len(of_moments) == (7 if by_moments else 3)
    assert len(of_moments) == (4 if by_moments else 0)


def products(hlo):
    """The lines of matrix products inside and outside the loops of an HLO text."""
    computations, name = {}, None
    for line in hlo.splitlines():
        if line.endswith("{") and (
            header := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)
        ):
            name = header[1]
            computations[name] = []
        elif name is not None:
            computations[name].append(line)
    looped = set()
    queue = re.findall(r" body=%?([\w.\-]+)", hlo)
    while queue:
        name = queue.pop()
        if name in looped:
            continue
        looped.add(name)
        body = "\n".join(computations[name])
        queue += re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)", body)
        queue += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", body)

    def dots(inside):
        return [
            line
            for name, lines in computations.items()
            if (name in looped) is inside
            for line in lines
            if " dot(" in line
        ]

    return dots(True), dots(False)


def shapes_in(line):
    """All the dimensions that an HLO line's tensors have."""
    shapes = re.findall(r"[a-z]\d+\[([\d,]+)\]", line)
    return {int(n) for shape in shapes for n in shape.split(",")}


# Refusals

BAD = [
    ({"units": 0}, r"`units`.*units=0"),
    ({"units": -3}, r"`units`.*units=-3"),
    ({"momentum": 1.5}, r"`momentum`.*momentum=1\.5"),
    ({"momentum": 1.0}, r"`momentum`.*momentum=1\.0"),
    ({"momentum": -0.1}, r"`momentum`.*momentum=-0\.1"),
    ({"epsilon": 0}, r"`epsilon`.*epsilon=0"),
    ({"epsilon": -1e-3}, r"`epsilon`.*epsilon=-0\.001"),
    ({"dropout": 7}, r"`dropout`.*dropout=7"),
    ({"dropout": 1.0}, r"`dropout`.*dropout=1\.0"),
    ({"recurrent_dropout": -0.5}, r"`recurrent_dropout`.*recurrent_dropout=-0\.5"),
    ({"normalize": "output"}, r"`normalize`.*normalize='output'"),
    ({"normalize": "recurrent"}, r"not available yet.*normalize='recurrent'"),
    ({"statistics": "batch"}, r"`statistics`.*statistics='batch'"),
    ({"population": "frame"}, r"`population`.*population='frame'"),
    ({"population": "timestep"}, r"not available yet.*population='timestep'"),
    ({"max_timesteps": 5}, r"`max_timesteps`.*max_timesteps=5"),
    (
        {"synchronized": True, "normalize": "joint"},
        r"synchronized=True, normalize='joint'",
    ),
]


@EACH
def test_bad_arguments(kind):
    layer = KINDS[kind][0]
    for cls in (layer, getattr(keras_bnrnn, layer.__name__ + "Cell")):
        for arguments, message in BAD:
            with pytest.raises(ValueError, match=message):
                cls(**{"units": 2, **arguments})


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_bad_use_cudnn(kind):
    for value in ("yes", 1, None):
        with pytest.raises(ValueError, match=f"use_cudnn={value!r}"):
            KINDS[kind][0](2, use_cudnn=value)


@EACH
def test_unknown_arguments(kind):
    with pytest.raises((TypeError, ValueError), match="normalise"):
        KINDS[kind][0](2, normalise="input")


@EACH
def test_bad_shapes(kind, rng):
    layer = make(kind)
    for shape in ((B, D), (B, T, D, 1)):
        with pytest.raises(ValueError, match=rf"ndim=3.*ndim={len(shape)}"):
            layer(frames(rng, *shape))
    with pytest.raises(ValueError, match=r"`mask`.*\(6, 5\).*\(6, 4\)"):
        layer(frames(rng), mask=np.ones((B, T - 1), bool))
    with pytest.raises(ValueError, match=r"`mask`.*\(6, 5\).*\(6, 5, 3\)"):
        layer(frames(rng), mask=np.ones((B, T, D), bool))
    with pytest.raises(ValueError, match=r"`mask`.*\(6, 5\).*\(1, 5\)"):
        layer(frames(rng), mask=np.ones((1, T), bool))


@EACH
def test_a_batch_of_one_cannot_train_frame_wise(kind, rng):
    x = frames(rng, 1, T, D)
    for variant in VARIANTS[1:]:
        layer = make(kind, rng, **variant)
        before = layer.get_weights()
        with pytest.raises(ValueError, match=r"statistics=.*\(1, 5, "):
            layer(x, training=True)
        for a, b in zip(layer.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)
        assert np.all(np.isfinite(layer(x)))
        layer.trainable = False
        assert np.all(np.isfinite(layer(x, training=True)))
    assert np.all(np.isfinite(make(kind, rng)(x, training=True)))


@EACH
@pytest.mark.parametrize("normalize", ["input", "joint"])
def test_a_batch_of_one_cannot_train_a_cell(kind, normalize, rng):
    cell = getattr(keras_bnrnn, KINDS[kind][0].__name__ + "Cell")(
        U, normalize=normalize
    )
    x, state = frames(rng, 1, D), cell.get_initial_state(1)
    with pytest.raises(ValueError, match=r"frame.*\(1, 3\)"):
        cell(x, state, training=True)
    assert np.all(np.isfinite(cell(x, state)[0]))


def test_joint_with_sequence_statistics_names_what_is_wrong(rng):
    """The message must not send a user from `statistics` to `statistics`."""
    with pytest.raises(ValueError, match=r"normalize='joint'"):
        make("lstm", normalize="joint")(frames(rng, 1, T, D), training=True)


# Documentation


def test_docstring_examples(monkeypatch):
    # Tracing and compiling the models of the examples takes longer than they run.
    eager = functools.partialmethod(keras.Model.compile, run_eagerly=True)
    monkeypatch.setattr(keras.Model, "compile", eager)
    names = ["keras_bnrnn"]
    for module in pkgutil.walk_packages(keras_bnrnn.__path__, "keras_bnrnn."):
        if not re.match(r"keras_bnrnn\.(serving|export|cli)\b", module.name):
            names.append(module.name)
    public = {n: getattr(keras_bnrnn, n) for n in keras_bnrnn.__all__}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    with_examples = set()
    for name in names:
        module = importlib.import_module(name)
        for test in finder.find(module, name, extraglobs={"np": np, "keras": keras}):
            test.globs.update(public)
            if test.examples:
                with_examples.add(test.name.rsplit(".", 1)[-1])
                assert runner.run(test).failed == 0, test.name
    of_layers = {cls.__name__ for cls, _ in KINDS.values()}
    assert with_examples >= of_layers | {"SequenceBatchNorm", "fold", "recalibrate"}


@pytest.mark.slow(but=["False-simple_rnn", "False-gru", "True-lstm"])
@EACH
@pytest.mark.parametrize("graph", [False, True])
def test_gradients_of_a_stateful_layer_are_those_of_its_states(kind, graph, rng):
    """The call changes the states before the gradient is taken."""
    cls = KINDS[kind][0]
    stateful, given = cls(U, stateful=True), cls(U)
    for layer in (stateful, given):
        layer.build((B, T, D))
    randomize(stateful, rng)
    given.set_weights(stateful.get_weights())
    states = [rng.normal(size=(B, U)).astype("float32") for _ in stateful.states]
    x = tf.constant(frames(rng, B, T, D))

    def gradients(layer, **call):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(layer(x, **call)))
        return tape.gradient(loss, [w.value for w in layer.trainable_variables])

    run = tf.function(gradients) if graph else gradients
    for state, value in zip(stateful.states, states, strict=True):
        state.assign(value)
    found = run(stateful)
    for a, b in zip(found, gradients(given, initial_state=states), strict=True):
        assert gap(a, b) <= 1e-5


@EACH
def test_a_refused_call_leaves_no_dropout_mask(kind, rng):
    layer = KINDS[kind][0](U, dropout=0.5, recurrent_dropout=0.5)
    x = frames(rng, B, T, D)
    with pytest.raises(ValueError, match="`mask`"):
        layer(x, mask=np.ones((B, T + 1), bool), training=True)
    assert layer(x[:2], training=True).shape == (2, U)


def test_arguments_of_the_base_layer():
    with pytest.raises(ValueError, match=r"`cell`.*None"):
        BNRNN()
    with pytest.raises(ValueError, match=r"`cell` must be a `BNCell`.*LSTMCell"):
        BNRNN(keras.layers.LSTMCell(3))
    with pytest.raises(
        ValueError, match=r"`use_cudnn`.*BNSimpleRNNCell.*use_cudnn=True"
    ):
        KINDS["simple_rnn"][0](U, use_cudnn=True)
    assert "use_cudnn" not in KINDS["simple_rnn"][0](U).get_config()


@EACH
def test_every_argument_is_an_attribute(kind):
    cls = KINDS[kind][0]
    given = {
        "normalize": "joint",
        "statistics": "frame",
        "momentum": 0.5,
        "epsilon": 0.25,
        "recurrent_dropout": 0.125,
        "use_bias": False,
        "go_backwards": True,
    }
    for layer, expected in ((cls(U), {}), (cls(U, **given), given)):
        parameters = inspect.signature(cls).parameters
        for name in parameters.keys() - {"kwargs"}:
            value = getattr(layer, name)
            if name in expected:
                assert value == expected[name]
            elif not callable(value) and name != "units":
                assert value == parameters[name].default, name
        for name in given.keys() - {"go_backwards"}:
            assert getattr(layer.cell, name) == getattr(layer, name)


@EACH
def test_units_may_be_an_integer_of_numpy(kind):
    layer = KINDS[kind][0](np.int64(3))
    assert type(layer.get_config()["units"]) is int
    layer.build((None, T, D))


@EACH
@pytest.mark.parametrize(
    "arguments", [{"use_bias": "no"}, {"recurrent_dropout": "a"}], ids=str
)
def test_bad_arguments_are_named_before_keras_fails(kind, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"`{name}`.*{name}='{value}'"):
        KINDS[kind][0](U, **arguments)


@pytest.mark.slow
def test_import_without_docstrings():
    code = "import keras_bnrnn"
    subprocess.run([sys.executable, "-OO", "-c", code], check=True, capture_output=True)
