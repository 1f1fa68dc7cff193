"""`recalibrate`, against float64 moments over all valid frames."""

import itertools

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import KINDS, gap, oracle_weights, random_mask, randomize
from keras import layers

import keras_bnrnn
from keras_bnrnn import recalibrate
from keras_bnrnn.traversal import sublayers

N, T, D, U = 23, 5, 3, 4
PADDING = 9.0
EACH = pytest.mark.parametrize("kind", KINDS)
CUTS = {
    "1": [1] * N,
    "7": [7, 7, 7, 2],
    "64": [N],
    "uneven": [3, 1, 9, 10],
}


def ours(kind, units=U, **arguments):
    arguments.setdefault("return_sequences", True)
    return KINDS[kind][0](units, **arguments)


def cell(kind, **arguments):
    return getattr(keras_bnrnn, KINDS[kind][0].__name__ + "Cell")(U, **arguments)


def masked_frames(rng, rows=N):
    """Frames with padding anywhere, and the mask that `Masking(PADDING)` makes."""
    mask = random_mask(rng, rows, T)
    x = np.where(mask[..., None], rng.normal(0.5, 2.0, (rows, T, D)), PADDING)
    return x.astype("float32"), mask


def cut(x, sizes):
    edges = np.cumsum([0, *sizes])
    return [x[a:b] for a, b in itertools.pairwise(edges)]


def randomized(model, rng):
    for layer in sublayers(model):
        if not isinstance(layer, keras.Model):
            randomize(layer, rng)
    return model


def masked_model(rng, *stack):
    """A functional model of a stack of layers over padded frames."""
    x = keras.Input((T, D))
    y = layers.Masking(PADDING)(x)
    for layer in stack:
        y = layer(y)
    return randomized(keras.Model(x, y), rng)


def small_model(kind="simple_rnn", **arguments):
    return keras.Sequential([keras.Input((T, D)), ours(kind, name="rnn", **arguments)])


def statistics(model):
    """Mean, variance and count of every norm, concatenated."""
    norms = [x for x in sublayers(model) if hasattr(x, "moving_mean")]
    return [
        np.asarray(w).copy()
        for n in norms
        for w in (n.moving_mean, n.moving_variance, n.update_count)
    ]


def check_moments(norm, z, mask=None, at_most=1e-6):
    """The statistics are the float64 moments of z, but for float32's rounding."""
    mean, variance = oracle.pooled_moments(z, mask)
    off = np.abs(np.asarray(norm.moving_mean, "float64") - mean)
    assert np.all(off <= at_most * np.sqrt(variance) + 1e-7 * np.abs(mean))
    off = np.abs(np.asarray(norm.moving_variance, "float64") - variance)
    assert np.all(off <= at_most * variance)


def check_input_layer(layer, x, mask):
    """Checks a layer of normalised input projections, given what it was fed."""
    kernel = np.asarray(layer.cell.kernel, "float64")
    check_moments(layer.cell.input_norm, np.asarray(x, "float64") @ kernel, mask)


# What is measured


@pytest.mark.slow
def test_deep_models_however_the_data_is_cut(rng):
    both = layers.Bidirectional(
        ours("gru", name="gru"),
        backward_layer=ours("lstm", name="lstm", go_backwards=True, statistics="frame"),
    )
    norm = keras_bnrnn.SequenceBatchNorm()
    stack = [both, norm, ours("simple_rnn", return_sequences=False)]
    model = masked_model(rng, *stack)
    x, mask = masked_frames(rng)
    results = []
    for sizes in CUTS.values():
        recalibrate(model, cut(x, sizes), verbose=0)
        results.append(statistics(model))

        fed = [layers.Masking(PADDING)(x)]
        for layer in stack[:-1]:
            fed.append(layer(fed[-1], **({} if layer is norm else {"mask": mask})))
        check_input_layer(both.forward_layer, x, mask)
        check_input_layer(both.backward_layer, x, mask)
        check_moments(norm, fed[1], mask)
        check_input_layer(stack[2], fed[2], mask)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert gap(a, b) <= 1e-6 * max(1.0, np.max(np.abs(b)))


@EACH
@pytest.mark.parametrize("statistics", ["sequence", "frame"])
def test_one_layer(kind, statistics, rng):
    layer = ours(kind, statistics=statistics, go_backwards=True, return_state=True)
    model = masked_model(rng, layer)
    x, mask = masked_frames(rng)
    recalibrate(model, x, batch_size=10, verbose=0)
    check_input_layer(layer, x, mask)


def test_a_layer_called_on_several_inputs(rng):
    """Its statistics are of all that it is called on."""
    a, b = keras.Input((None, D)), keras.Input((None, D))
    shared = ours("gru")
    model = keras.Model([a, b], [shared(a), shared(b)])
    randomized(model, rng)
    x, y = rng.normal(size=(2, N, T, D)).astype("float32")
    y = 3.0 * y[:, :2] + 1.0
    recalibrate(model, [x, y], batch_size=7, verbose=0)
    together = np.concatenate([x.reshape(-1, D), y.reshape(-1, D)])
    check_input_layer(shared, together[None], None)


def test_a_layer_called_on_its_own_output(rng):
    """Its statistics depend on themselves: what it now sees is what they say."""
    shared = ours("lstm", D)
    x = keras.Input((None, D))
    once = shared(x)
    model = keras.Model(x, shared(once))
    randomized(model, rng)
    data = rng.normal(size=(N, T, D)).astype("float32")
    recalibrate(model, data, batch_size=7, verbose=0)
    fed = np.concatenate([data, shared(data)])
    z = fed.astype("float64") @ np.asarray(shared.cell.kernel, "float64")
    check_moments(shared.input_norm, z, at_most=1e-5)


def test_cells_in_rnn_layers(rng):
    first = layers.RNN(cell("lstm"), return_sequences=True)
    cells = [cell("simple_rnn"), layers.LSTMCell(3), cell("gru")]
    stack = layers.RNN(cells, return_sequences=True, go_backwards=True)
    model = masked_model(rng, first, stack)
    x, mask = masked_frames(rng)
    recalibrate(model, cut(x, [12, 11]), verbose=0)

    check_input_layer(first, x, mask)
    fed = first(x, mask=mask)
    # From below, each cell alone; the first one turns time around.
    for number, one in enumerate(cells):
        alone = layers.RNN(one, return_sequences=True, go_backwards=number == 0)
        if number != 1:
            check_input_layer(alone, fed, mask)
        fed = alone(fed, mask=mask)
        if number == 0:
            mask = mask[:, ::-1].copy()


def test_standalone_norm_of_any_rank(rng):
    norms = [keras_bnrnn.SequenceBatchNorm(momentum=0.9) for _ in range(2)]
    x = keras.Input((T, 2, D))
    y = norms[1](keras.ops.tanh(norms[0](x)))
    model = randomized(keras.Model(x, y), rng)
    data = rng.normal(3.0, 2.0, (N, T, 2, D)).astype("float32")
    recalibrate(model, data, batch_size=7, verbose=0)
    check_moments(norms[0], data.reshape(N, -1, D))
    above = np.tanh(np.asarray(norms[0](data), "float64"))
    check_moments(norms[1], above.reshape(N, -1, D))


def test_time_distributed(rng):
    layer = ours("gru")
    model = keras.Sequential([keras.Input((2, T, D)), layers.TimeDistributed(layer)])
    randomized(model, rng)
    x = rng.normal(size=(N, 2, T, D)).astype("float32")
    recalibrate(model, x, batch_size=7, verbose=0)
    check_input_layer(layer, x.reshape(N, -1, D), None)


@pytest.mark.slow(but=["gru"])
@EACH
def test_joint(kind, rng):
    """Self-consistent: running with the statistics gives these very statistics."""
    layer = ours(kind, normalize="joint")
    x, mask = masked_frames(rng)
    results = []
    for sizes in (CUTS["7"], CUTS["uneven"]):
        rng = np.random.default_rng(1)
        model = masked_model(rng, layer)
        recalibrate(model, cut(x, sizes), verbose=0)
        check_moments(layer.input_norm, joint_sums(kind, layer, x, mask), mask, 1e-5)
        results.append(statistics(model))
    for a, b in zip(*results, strict=True):
        assert gap(a, b) <= 1e-5 * max(1.0, np.max(np.abs(b)))


def joint_sums(kind, layer, x, mask):
    """W x + U h of every frame, (N, T, G*U), from the float64 loop."""
    weights = oracle_weights(layer)
    seen = np.zeros((*mask.shape, len(weights["gamma"])))
    t_of_call = []

    def norm(a, t, part):
        seen[:, t, part] = a
        t_of_call.append(t)
        mean, variance = weights["moving_mean"], weights["moving_variance"]
        normalized = (a - mean[part]) / np.sqrt(variance[part] + 1e-3)
        return weights["gamma"][part] * normalized + weights["beta"][part]

    z = np.where(mask[..., None], x, 0.0).astype("float64") @ weights["kernel"]
    oracle._loop(np, kind, z, mask, weights, norm, True, False, None, False)
    assert set(t_of_call) == set(range(T))
    return seen


def test_a_mean_far_from_zero(rng):
    model = small_model("lstm")
    randomized(model, rng)
    layer = model.get_layer("rnn")
    x = rng.normal(1e3, 1.0, (N, T, D)).astype("float32")
    recalibrate(model, x, batch_size=7, verbose=0)
    check_input_layer(layer, x, None)


# Kinds of data


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def kinds_of_data(x):
    """Every kind of data with the 21 frames of x in batches of 7."""
    y, w = x[:, 0, :1], np.ones(len(x), "float32")
    batches = cut(x, [7, 7, 7])
    labelled = list(zip(batches, cut(y, [7, 7, 7]), strict=True))
    dataset = tf.data.Dataset.from_tensor_slices
    return {
        "array": (x, None),
        "tensor": (tf.constant(x), None),
        "dict": ({"frames": x}, None),
        "batches": (batches, None),
        "labelled batches": (labelled, None),
        "dataset": (dataset(x).batch(7), None),
        "(x, y)": (dataset((x, y)).batch(7), None),
        "(x, y, w)": (dataset((x, y, w)).batch(7), None),
        "dataset of dicts": (dataset(({"frames": x}, y)).batch(7), None),
        "PyDataset": (Batches(labelled), None),
        "PyDataset, steps": (Batches(labelled + labelled), 3),
        "generator": ((b for b in labelled * 2), 3),
        "endless": (dataset((x, y)).batch(7).repeat(), 3),
        "endless generator": (endless(batches), 3),
    }


def endless(batches):
    while True:
        yield from batches


def test_kinds_of_data(rng):
    x = rng.normal(1.0, 2.0, (21, T, D)).astype("float32")
    inputs = keras.Input((T, D), name="frames")
    # Not a recurrent layer: each kind of data traces the model again.
    layer = keras_bnrnn.SequenceBatchNorm(name="norm")
    model = keras.Model(inputs, layer(inputs))
    by_name = keras.Model({"frames": inputs}, model.outputs)
    for name, (data, steps) in kinds_of_data(x).items():
        randomize(layer, rng)
        of_dicts = "dict" in name
        moved = recalibrate(
            by_name if of_dicts else model, data, steps, batch_size=7, verbose=0
        )
        assert list(moved) == ["norm"], name
        check_moments(layer, x)


def test_several_inputs(rng):
    a, b = keras.Input((T, D), name="a"), keras.Input((T, D), name="b")
    first, second = ours("simple_rnn"), keras_bnrnn.SequenceBatchNorm()
    outputs = second(first(a) + layers.Dense(U)(b))
    x, y = rng.normal(size=(2, 21, T, D)).astype("float32")
    listed = randomized(keras.Model([a, b], outputs), rng)
    named = keras.Model({"a": a, "b": b}, outputs)
    results = []
    for model, data in (
        (listed, [x, y]),
        (listed, tf.data.Dataset.from_tensor_slices(((x, y), x[:, 0])).batch(7)),
        (listed, [((x[:7], y[:7]),), ((x[7:], y[7:]),)]),
        (named, {"a": x, "b": y}),
    ):
        recalibrate(model, data, batch_size=7, verbose=0)
        check_input_layer(first, x, None)
        results.append(statistics(listed))
    for result in results:
        for a, b in zip(result, results[0], strict=True):
            assert gap(a, b) <= 1e-6


def test_steps_take_the_first_batches(rng):
    model = small_model()
    x = rng.normal(size=(N, T, D)).astype("float32")
    for data in (x, cut(x, CUTS["7"]), Batches(cut(x, CUTS["7"]))):
        recalibrate(model, data, steps=2, batch_size=7, verbose=0)
        check_input_layer(model.get_layer("rnn"), x[:14], None)


# What is refused


class Counter:
    """A dataset whose endlessness shows by nothing but being an iterator."""

    def __iter__(self):
        return self

    def __next__(self):
        return np.zeros((2, T, D), "float32")


class Endless(keras.utils.PyDataset):
    @property
    def num_batches(self):
        return None

    def __getitem__(self, index):
        return np.zeros((2, T, D), "float32")


def test_refused_data(rng):
    model = randomized(small_model(), rng)
    before = statistics(model)
    x = rng.normal(size=(4, T, D)).astype("float32")
    empty = x[:0]
    dataset = tf.data.Dataset.from_tensor_slices(x).batch(2)
    refused = [
        ([], None, r"`data`.*batch.*empty"),
        (empty, None, r"`data`.*batch.*empty"),
        (tf.data.Dataset.from_tensor_slices(empty).batch(2), None, r"`data`.*empty"),
        ([empty], None, r"`data`.*no valid frame.*'rnn'"),
        (dataset.repeat(), None, r"`steps`.*steps=None"),
        (Endless(), None, r"`steps`.*steps=None"),
        ((b for b in [x]), None, r"`steps`.*steps=None"),
        (Counter(), None, r"`steps`.*steps=None"),
        (x, 0, r"`steps`.*steps=0"),
        (x, -1, r"`steps`.*steps=-1"),
        (x, 1.5, r"`steps`.*steps=1\.5"),
        (dataset, 3, r"`steps`.*steps=3 with 2 batches"),
        ((b for b in [x, x]), 3, r"`steps`.*steps=3 with 2 batches"),
        (Batches([x]), 2, r"`steps`.*steps=2 with 1 batch"),
    ]
    for data, steps, message in refused:
        with pytest.raises(ValueError, match=message):
            recalibrate(model, data, steps, verbose=0)
    for a, b in zip(statistics(model), before, strict=True):
        np.testing.assert_array_equal(a, b)

    masked = masked_model(rng, ours("gru", name="gru"))
    before = statistics(masked)
    with pytest.raises(ValueError, match=r"no valid frame.*'gru'"):
        recalibrate(masked, np.full((4, T, D), PADDING, "float32"), verbose=0)
    for a, b in zip(statistics(masked), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_refused_models(rng):
    x = rng.normal(size=(4, T, D)).astype("float32")
    with pytest.raises(ValueError, match=r"built.*model=<Sequential name=not_yet"):
        recalibrate(keras.Sequential([ours("lstm")], name="not_yet"), x)
    with pytest.raises(ValueError, match=r"`keras\.Model`.*model=<BNLSTM"):
        recalibrate(ours("lstm"), x)
    stock = keras.Sequential([keras.Input((T, D)), layers.LSTM(U)], name="stock")
    with pytest.raises(ValueError, match=r"no batch-normalised layer.*'stock'"):
        recalibrate(stock, x)


def test_an_error_in_the_data_changes_nothing(rng):
    """Nothing, even where lower layers had been set already."""
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(2, T, D)),
            ours("simple_rnn"),
            ours("gru", stateful=True),
        ]
    )
    randomized(model, rng)
    x = rng.normal(size=(2, T, D)).astype("float32")
    model(x)
    reads = []

    def batches():
        reads.append(None)
        yield x
        if len(reads) > 2:  # the look at the first batch, and one pass
            raise OSError("the disk is gone")
        yield x

    data = tf.data.Dataset.from_generator(
        batches, output_signature=tf.TensorSpec((2, T, D))
    )
    before = model.get_weights() + statistics(model) + states_of(model)
    with pytest.raises(Exception, match="the disk is gone"):
        recalibrate(model, data, verbose=0)
    assert len(reads) > 2
    after = model.get_weights() + statistics(model) + states_of(model)
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any("call" in vars(layer) for layer in sublayers(model))


def states_of(model):
    return [
        np.asarray(state).copy()
        for layer in model.layers
        if getattr(layer, "stateful", False)
        for state in layer.states
    ]


# What else changes, and what does not


@pytest.mark.slow(but=["lstm"])
@EACH
def test_stateful_layers_keep_their_states(kind, rng):
    layer = ours(kind, stateful=True, normalize="joint")
    top = ours("gru", stateful=True)
    model = keras.Sequential([keras.Input(batch_shape=(3, T, D)), layer, top])
    randomized(model, rng)
    x = rng.normal(size=(12, T, D)).astype("float32")
    model(x[:3])
    before = states_of(model)
    recalibrate(model, x, batch_size=3, verbose=0)
    for a, b in zip(states_of(model), before, strict=True):
        np.testing.assert_array_equal(a, b)

    # Rows go on from batch to batch: one long sequence from states of zero.
    long = np.concatenate(cut(x, [3] * 4), axis=1)  # (3, 4T, D)
    twin = KINDS[kind][0].from_config({**layer.get_config(), "stateful": False})
    twin.build((None, None, D))
    twin.set_weights(layer.get_weights())
    check_input_layer(top, twin(long), None)


def test_only_population_statistics_change_and_training_goes_on(rng):
    model = keras.Sequential(
        [
            keras.Input((T, D)),
            layers.BatchNormalization(),
            ours("lstm", 8, name="lstm", dropout=0.1, momentum=0.9),
            layers.Dropout(0.2, seed=1),
            layers.Bidirectional(
                ours("simple_rnn", return_sequences=False), name="both"
            ),
            layers.Dense(1),
        ]
    )
    x = rng.normal(1.0, 2.0, (32, T, D)).astype("float32")
    y = x[:, -1, :1] - 1.0
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    model.fit(x, y, epochs=1, verbose=0)
    before = {v.path: np.asarray(v).copy() for v in all_variables(model)}
    config, trainable = model.get_config(), [x.trainable for x in sublayers(model)]
    moved = recalibrate(model, x, verbose=0)
    assert list(moved) == ["lstm", "forward_bn_simple_rnn", "backward_bn_simple_rnn"]
    changed = {
        v.path for v in all_variables(model) if np.any(np.asarray(v) != before[v.path])
    }
    assert {p.rsplit("/", 1)[-1] for p in changed} == {
        "moving_mean",
        "moving_variance",
        "update_count",
    }
    assert len(changed) == 9
    assert not any("batch_normalization" in path for path in changed)
    assert model.get_config() == config
    assert [x.trainable for x in sublayers(model)] == trainable
    assert not any("call" in vars(layer) for layer in sublayers(model))

    losses = model.fit(x, y, epochs=5, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]


def all_variables(model):
    return model.variables + model.optimizer.variables


def test_a_training_step_moves_on_from_what_was_set(rng):
    """However young the moving averages were."""
    model = small_model("gru", momentum=0.9)
    norm = model.get_layer("rnn").input_norm
    x = rng.normal(size=(N, T, D)).astype("float32")
    recalibrate(model, x, verbose=0)
    mean = np.asarray(norm.moving_mean)
    y = 2.0 * x + 1.0
    kernel = np.asarray(model.get_layer("rnn").cell.kernel, "float64")
    batch_mean, _ = oracle.pooled_moments(y.astype("float64") @ kernel, None)
    model(y, training=True)
    expected = 0.9 * mean + 0.1 * batch_mean
    assert gap(norm.moving_mean, expected) <= 1e-5


def test_what_is_returned_is_how_far_statistics_moved(rng):
    above = ours("simple_rnn", name="two", epsilon=0.5)
    stack = [ours("simple_rnn", name="one"), above]
    model = masked_model(rng, *stack)
    x, _ = masked_frames(rng)
    before = statistics(model)
    moved = recalibrate(model, x, verbose=0)
    after = statistics(model)
    assert list(moved) == ["one", "two"]
    for index, (name, epsilon) in enumerate((("one", 1e-3), ("two", 0.5))):
        (old_mean, old_variance, _), (mean, variance, _) = (
            s[3 * index : 3 * index + 3] for s in (before, after)
        )
        by = np.max(np.abs(mean - old_mean) / np.sqrt(variance + epsilon))
        assert moved[name]["mean"] == pytest.approx(by, rel=1e-5)
        by = np.max(np.abs(variance - old_variance) / (variance + epsilon))
        assert moved[name]["variance"] == pytest.approx(by, rel=1e-5)
    again = recalibrate(model, x, verbose=0)
    assert max(v for how in again.values() for v in how.values()) <= 1e-6


def test_frozen_layers_and_padding_of_nan(rng):
    """Statistics are set in a frozen layer too; NaN in padding has no effect."""
    layer = ours("lstm")
    x = keras.Input((None, D))
    mask = keras.Input((None,), dtype="bool")
    model = randomized(keras.Model([x, mask], layer(x, mask=mask)), rng)
    layer.trainable = False
    data, valid = masked_frames(rng)
    data = np.where(valid[..., None], data, np.nan)
    recalibrate(model, [data, valid], batch_size=7, verbose=0)
    check_input_layer(layer, np.where(valid[..., None], data, 0.0), valid)
    assert not layer.trainable


def test_mixed_precision(rng):
    layer = ours("gru", dtype="mixed_bfloat16")
    model = randomized(keras.Sequential([keras.Input((T, D)), layer]), rng)
    # Values that bfloat16 holds exactly, in the data and in the kernel.
    x = rng.integers(-8, 8, (N, T, D)).astype("float32")
    layer.cell.kernel.assign(rng.integers(-8, 8, layer.cell.kernel.shape) / 8)
    recalibrate(model, x, batch_size=7, verbose=0)
    check_input_layer(layer, x, None)
    assert layer.input_norm.moving_mean.dtype == "float32"


@pytest.mark.parametrize("built", [True, False])
def test_a_layer_that_is_never_called(built, rng):
    class Forgetful(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = ours("gru", name="used"), ours("gru", name="idle")

        def build(self, shape):
            self.used.build(shape)
            if built:
                self.unused.build(shape)

        def call(self, x):
            return self.used(x)

    model = Forgetful()
    x = rng.normal(size=(N, T, D)).astype("float32")
    model(x)
    with pytest.warns(UserWarning, match=r"never called.*idle"):
        moved = recalibrate(model, x, verbose=0)
    assert list(moved) == ["used"]
    check_input_layer(model.used, x, None)


def test_progress(rng, capsys):
    model = keras.Sequential(
        [
            keras.Input((T, D)),
            keras_bnrnn.SequenceBatchNorm(name="one"),
            layers.Bidirectional(ours("simple_rnn", name="two")),
        ]
    )
    x = rng.normal(size=(N, T, D)).astype("float32")
    recalibrate(model, x, batch_size=7)
    told = capsys.readouterr().out
    assert "1/2: one" in told
    assert "2/2: forward_two, backward_two" in told
    assert told.count("Recalibrating") == 2 and "4/4" in told
    recalibrate(model, x, batch_size=7, verbose=0)
    assert capsys.readouterr().out == ""


def test_a_tuple_of_x_and_y_is_not_taken_for_data(rng):
    model = keras.Sequential([keras.Input((None, 3)), keras_bnrnn.BNLSTM(2)])
    x = rng.normal(size=(8, 5, 3))
    with pytest.raises(ValueError, match=r"`data`.*a tuple of 2 arrays"):
        recalibrate(model, (x, x), verbose=0)
    for arguments, message in (
        ({"batch_size": 0}, "`batch_size`.*batch_size=0"),
        ({"batch_size": -1}, "`batch_size`.*batch_size=-1"),
        ({"steps": True}, "`steps`.*steps=True"),
    ):
        with pytest.raises(ValueError, match=message):
            recalibrate(model, x, verbose=0, **arguments)


def test_batches_that_are_lists_of_several_inputs(rng):
    inputs = [keras.Input((None, 3)) for _ in range(2)]
    norm = keras_bnrnn.SequenceBatchNorm()
    model = keras.Model(inputs, keras.layers.Add()([norm(x) for x in inputs]))
    x, y = (rng.normal(i, 1.0, (8, 5, 3)) for i in range(2))
    recalibrate(model, [[x[:3], y[:3]], [x[3:], y[3:]]], verbose=0)
    frames = np.concatenate([x, y]).reshape(-1, 3)
    np.testing.assert_allclose(norm.moving_mean, frames.mean(0), atol=1e-6)


def test_layers_of_one_name_are_numbered(rng):
    def part():
        return keras.Sequential(
            [
                keras.Input((None, 3)),
                keras_bnrnn.BNSimpleRNN(3, return_sequences=True, name="rnn"),
            ]
        )

    model = keras.Sequential([keras.Input((None, 3)), part(), part()])
    moved = recalibrate(model, rng.normal(size=(8, 5, 3)), verbose=0)
    assert list(moved) == ["rnn", "rnn_1"]


def test_one_graph_for_each_group_however_long_the_batches_are(rng):
    traces = []

    class Spy(layers.Layer):
        def call(self, x):
            traces.append(x.shape)
            return x

    model = keras.Sequential(
        [
            keras.Input((None, D)),
            Spy(),
            ours("simple_rnn"),
            keras_bnrnn.SequenceBatchNorm(),
            ours("simple_rnn"),
        ]
    )
    randomized(model, rng)
    batches = [
        rng.normal(size=(rows, length, D)).astype("float32")
        for rows, length in [(4, 5), (4, 9), (3, 5), (2, 7), (4, 6)]
    ]
    traces.clear()
    recalibrate(model, batches, verbose=0)
    # Eagerly to see the order of the layers, then once for each of the three.
    assert len(traces) == 4
    assert all(shape == (None, None, D) for shape in traces[1:])
    together = np.concatenate([batch.reshape(-1, D) for batch in batches])
    layer = model.layers[1]
    x = together.astype("float64") @ layer.cell.kernel.numpy().astype("float64")
    # float64 sums of float32 products: 1e-6.
    np.testing.assert_allclose(
        layer.cell.input_norm.moving_mean, x.mean(0), rtol=1e-5, atol=1e-6
    )
