"""`NormalizationMonitor`: gaps, gamma and saturated gates, against float64 loops."""

import random

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import KINDS, gap, oracle_weights, random_mask, randomize, randomize_model
from keras import layers
from layers.test_new_cell import MGU, MGUCell, sigmoid

import keras_bnrnn
from keras_bnrnn import (
    BNLSTM,
    BNSimpleRNN,
    NormalizationMonitor,
    Recalibrate,
    SequenceBatchNorm,
)
from keras_bnrnn.layers import BNRNN

B, T, D, U = 9, 6, 3, 4
PADDING = 9.0


def masked_frames(rng, rows=B):
    """Frames with padding anywhere, and the mask that `Masking(PADDING)` makes."""
    mask = random_mask(rng, rows, T)
    x = np.where(mask[..., None], rng.normal(0.5, 2.0, (rows, T, D)), PADDING)
    return x, mask


def masked_model(rng, *stack):
    model = keras.Sequential([keras.Input((T, D)), layers.Masking(PADDING), *stack])
    randomize_model(model, rng)
    return model


def measured(model, batch, epoch=0, **arguments):
    """What the callback records in an epoch, without the training."""
    monitor = NormalizationMonitor(batch, **arguments)
    monitor.set_model(model)
    monitor.on_train_begin()
    monitor.on_epoch_begin(epoch)
    monitor.on_epoch_end(epoch)
    monitor.on_train_end()
    return monitor.history[epoch]


def shares(values, low, high, margin=0.05):
    """The shares of values near the lower and the upper bound."""
    return np.mean(values < low + margin), np.mean(values > high - margin)


def check_gates(record, values, margin=0.05):
    for gate, of_gate in values.items():
        bottom = -1.0 if gate in "ch" else 0.0
        low, high = shares(of_gate, bottom, 1.0, margin)
        assert record[f"saturated/{gate}/low"] == pytest.approx(low, abs=1e-12)
        assert record[f"saturated/{gate}/high"] == pytest.approx(high, abs=1e-12)
        assert record[f"saturated/{gate}"] == pytest.approx(low + high, abs=1e-12)
    recorded = {key.split("/")[1] for key in record if key.startswith("saturated")}
    assert recorded == set(values)


def check_gaps(record, norm, rows, frame_wise):
    found = oracle.gaps(
        rows,
        np.asarray(norm.moving_mean),
        np.asarray(norm.moving_variance),
        frame_wise=frame_wise,
    )
    for name, value in zip(("mean_gap", "variance_gap"), found, strict=True):
        assert record[f"{name}/mean"] == pytest.approx(value.mean(), rel=1e-9)
        assert record[f"{name}/max"] == pytest.approx(value.max(), rel=1e-9)
    gamma = np.asarray(norm.gamma)
    for name in ("mean", "min", "max"):
        expected = getattr(np, name)(gamma)
        assert record[f"gamma/{name}"] == pytest.approx(expected, rel=1e-12)


# What is measured


@pytest.mark.slow(but=["sequence-simple_rnn", "frame-gru", "joint-lstm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["sequence", "frame", "joint"])
def test_values_equal_those_of_a_loop(kind, where, rng, float64):
    """Both compute in float64, so only the order of sums differs: 1e-9."""
    arguments = {"statistics": where}
    if where == "joint":
        arguments = {"normalize": "joint"}
    if kind == "lstm":
        arguments["peephole"] = True
    backwards = where == "frame"
    layer = KINDS[kind][0](U, go_backwards=backwards, name="rnn", **arguments)
    x, mask = masked_frames(rng)
    model = masked_model(rng, layer)
    record = measured(model, (x, None), margin=0.2)["rnn"]
    values, rows = oracle.gates_of_rows(
        kind,
        x,
        mask,
        oracle_weights(layer),
        normalize=layer.normalize,
        go_backwards=backwards,
    )
    check_gates(record, values, margin=0.2)
    check_gaps(record, layer.input_norm, rows, frame_wise=where != "sequence")
    assert 0.01 < record["saturated/h" if kind != "lstm" else "saturated/c"] < 0.9


@pytest.mark.parametrize("statistics", ["sequence", "frame"])
def test_a_standalone_norm(statistics, rng, float64):
    norm = SequenceBatchNorm(statistics=statistics, name="norm")
    x, mask = masked_frames(rng)
    record = measured(masked_model(rng, norm), x)["norm"]
    rows = [row[valid] for row, valid in zip(x, mask, strict=True)]
    check_gaps(record, norm, rows, frame_wise=statistics == "frame")
    assert not any(key.startswith("saturated") for key in record)


def test_a_norm_of_rank_4_without_gamma(rng, float64):
    norm = SequenceBatchNorm(statistics="frame", scale=False, name="norm")
    model = keras.Sequential([keras.Input((T, 2, D)), norm])
    randomize_model(model, rng)
    x = rng.normal(size=(B, T, 2, D))
    record = measured(model, x)["norm"]
    rows = list(x.transpose(0, 2, 1, 3).reshape(-1, T, D))
    found = oracle.gaps(rows, norm.moving_mean, norm.moving_variance, frame_wise=True)
    assert record["mean_gap/max"] == pytest.approx(found[0].max(), rel=1e-9)
    assert record["variance_gap/mean"] == pytest.approx(found[1].mean(), rel=1e-9)
    assert set(record) == {
        f"{gap}/{of}" for gap in ("mean_gap", "variance_gap") for of in ("mean", "max")
    }


def test_layers_inside_other_layers(rng, float64):
    """Each is measured as it is alone on what it is called with."""
    both = layers.Bidirectional(KINDS["gru"][0](U, return_sequences=True, name="gru"))
    x = keras.Input((T, D))
    inner = keras.Model(x, both(layers.Masking(PADDING)(x)), name="inner")
    top = KINDS["simple_rnn"][0](U, name="top")
    model = keras.Sequential([keras.Input((T, D)), inner, SequenceBatchNorm(), top])
    randomize_model(model, rng)
    x, mask = masked_frames(rng)
    record = measured(model, x)
    names = ["forward_gru", "backward_gru", "sequence_batch_norm", "top"]
    assert list(record) == names
    for name, layer in zip(
        names[:2], (both.forward_layer, both.backward_layer), strict=True
    ):
        values, rows = oracle.gates_of_rows(
            "gru", x, mask, oracle_weights(layer), go_backwards=layer.go_backwards
        )
        check_gates(record[name], values)
        check_gaps(record[name], layer.input_norm, rows, frame_wise=False)
    fed = np.asarray(model.layers[1](both(x, mask=mask)))
    values, rows = oracle.gates_of_rows("simple_rnn", fed, mask, oracle_weights(top))
    check_gates(record["top"], values)
    check_gaps(record["top"], top.input_norm, rows, frame_wise=False)


def test_stacked_cells(rng, float64):
    """Cells in `keras.layers.RNN` are frame-wise in training."""
    cells = [layers.LSTMCell(U), keras_bnrnn.BNGRUCell(U, name="upper")]
    rnn = layers.RNN(cells, name="stack")
    x, mask = masked_frames(rng)
    model = masked_model(rng, rnn)
    randomize(cells[1], rng)
    record = measured(model, x)
    assert list(record) == ["stack/upper"]
    fed = layers.RNN(cells[0], return_sequences=True)(x, mask=mask)
    alone = BNRNN(cells[1])
    values, rows = oracle.gates_of_rows("gru", fed, mask, oracle_weights(alone))
    check_gates(record["stack/upper"], values)
    check_gaps(record["stack/upper"], cells[1].input_norm, rows, frame_wise=True)


def test_a_layer_called_several_times(rng, float64):
    """`TimeDistributed` calls its layer once for each outer timestep."""
    layer = BNLSTM(U, name="lstm")
    model = keras.Sequential([keras.Input((2, T, D)), layers.TimeDistributed(layer)])
    randomize_model(model, rng)
    x = rng.normal(1.0, 2.0, size=(B, 2, T, D))
    record = measured(model, x)["lstm"]
    mask, weights = np.ones((B, T), bool), oracle_weights(layer)
    calls = [oracle.gates_of_rows("lstm", x[:, i], mask, weights) for i in range(2)]
    values = {
        name: np.concatenate([values[name] for values, _ in calls]) for name in "ifco"
    }
    check_gates(record, values)
    population = weights["moving_mean"], weights["moving_variance"]
    found = [oracle.gaps(rows, *population)[0] for _, rows in calls]
    expected = np.mean(found, axis=0).mean()
    assert record["mean_gap/mean"] == pytest.approx(expected, rel=1e-9)


def test_kinds_of_batches(rng):
    """x alone, tuples, lists and dicts of several inputs."""
    inputs = [keras.Input((T, D), name=name) for name in "ab"]
    norms = [SequenceBatchNorm(name=f"norm_{name}") for name in "ab"]
    model = keras.Model(
        inputs, [norm(x) for norm, x in zip(norms, inputs, strict=True)]
    )
    a, b = rng.normal(size=(2, B, T, D)).astype("float32")
    y, w = np.zeros((B, 1)), np.zeros(B)
    expected = measured(model, {"a": a, "b": b})
    assert expected["norm_a"] != expected["norm_b"]
    for batch in ([a, b], ([a, b], y), ({"a": a, "b": b}, y, w), (tf.constant(a), b)):
        if isinstance(batch, tuple) and len(batch) == 2 and batch[1] is b:
            batch = ([batch[0], tf.constant(b)],)
        assert measured(model, batch) == expected


def test_half_precision_and_weights_that_are_not_numbers(rng):
    layer = KINDS["gru"][0](U, dtype="mixed_float16", name="gru")
    model = keras.Sequential([keras.Input((T, D)), layer])
    x = rng.normal(size=(B, T, D)).astype("float32")
    monitor = NormalizationMonitor(x)
    monitor.set_model(model)
    monitor.on_train_begin()
    kernel = np.asarray(layer.cell.kernel).copy()
    for epoch, broken in enumerate((False, True)):
        if broken:
            kernel[0, 0] = np.nan  # of the first unit's z
            layer.cell.kernel.assign(kernel)
        monitor.on_epoch_begin(epoch)
        monitor.on_epoch_end(epoch)
    first, second = (monitor.history[epoch]["gru"] for epoch in (0, 1))
    assert np.isfinite(list(first.values())).all()
    for key in ("mean_gap/max", "saturated/z", "saturated/h"):
        assert np.isnan(second[key])
    assert np.isfinite(second["gamma/mean"])


# Cells of other packages


class DeclaredCell(MGUCell):
    gate_activations = (("f", "recurrent_activation"), ("h", "activation"))


class SilentCell(MGUCell):
    gate_activations = (("f", "recurrent_activation"), ("h", "activation"))

    def step(self, projected, recurrent, states, weights, norm):
        return super().step(projected, recurrent, states, weights, lambda _, a, __: a)


class MisdeclaredCell(MGUCell):
    gate_activations = (("f", "recurrent_activation"), ("h", "no_such_activation"))


class OtherLSTMCell(keras_bnrnn.BNLSTMCell):
    def step(self, *arguments):
        return super().step(*arguments)


def test_a_declared_cell_is_measured(rng, float64):
    layer = BNRNN(DeclaredCell(U), name="mgu")
    x, mask = masked_frames(rng)
    record = measured(masked_model(rng, layer), x)["mgu"]
    w = oracle_weights(layer)
    gates = {"f": [], "h": []}
    for frames, valid in zip(x, mask, strict=True):
        h = np.zeros(U)
        for frame in frames[valid]:
            a = frame @ w["kernel"] - w["moving_mean"]
            a = w["gamma"] * a / np.sqrt(w["moving_variance"] + 1e-3) + w["beta"]
            r = h @ w["recurrent_kernel"]
            f = sigmoid(a[:U] + r[:U])
            candidate = np.tanh(a[U:] + f * r[U:])
            h = (1 - f) * h + f * candidate
            gates["f"].append(f)
            gates["h"].append(candidate)
    check_gates(record, {name: np.array(value) for name, value in gates.items()})


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (MGUCell, "MGUCell does not declare `gate_activations`"),
        (SilentCell, r"`step` of SilentCell does not pass .* to `norm\('joint', a, "),
        (MisdeclaredCell, "MisdeclaredCell must name 2 gates.*no_such_activation"),
        (OtherLSTMCell, "OtherLSTMCell overrides `step` or `loop_kernel`, but not"),
    ],
)
def test_other_cells_are_measured_but_for_their_gates(cell, reason, rng):
    model = keras.Sequential([keras.Input((T, D)), BNRNN(cell(U), name="rnn")])
    with pytest.warns(UserWarning, match=f"not measured: rnn: .*{reason}"):
        record = measured(model, rng.normal(size=(B, T, D)))["rnn"]
    assert record["mean_gap/mean"] > 0
    assert not any(key.startswith("saturated") for key in record)


def test_a_gate_without_known_bounds_is_left_out(rng):
    model = keras.Sequential([keras.Input((T, D)), BNLSTM(U, "relu", name="rnn")])
    with pytest.warns(UserWarning, match="rnn: no bounds .* 'c' .* 'relu'"):
        record = measured(model, rng.normal(size=(B, T, D)))["rnn"]
    gates = {key.split("/")[1] for key in record if key.startswith("saturated")}
    assert gates == set("ifo")


# In training


def small_model():
    model = keras.Sequential(
        [
            keras.Input((T, D), batch_size=8),
            layers.SimpleRNN(U, return_sequences=True, dropout=0.2, unroll=True),
            BNSimpleRNN(U, recurrent_dropout=0.3, stateful=True, name="rnn"),
            layers.Dense(1),
        ]
    )
    model.compile("adam", "mse", run_eagerly=True)  # saves compiling it
    return model


def all_variables(model):
    values = model.variables + model.optimizer.variables
    return [np.asarray(v).copy() for v in values + model.get_layer("rnn").states]


def fit(model, rng, callbacks=(), **arguments):
    x, y = rng.normal(3.0, 2.0, (32, T, D)), rng.normal(size=(32, 1))
    history = model.fit(
        x, y, batch_size=8, callbacks=list(callbacks), verbose=0, **arguments
    )
    return x, history.history


@pytest.mark.slow(but=["True"])
@pytest.mark.parametrize("validated", [False, True])
def test_training_is_bitwise_the_same(validated):
    results = []
    for monitored in (False, True):
        keras.utils.set_random_seed(1)
        rng = np.random.default_rng(1)
        model = small_model()
        batch = rng.normal(size=(8, T, D)), np.zeros((8, 1)), np.ones(8)
        callbacks = [NormalizationMonitor(batch)] if monitored else []
        validation = batch[:2] if validated else None
        _, losses = fit(
            model,
            rng,
            callbacks,
            epochs=2,
            validation_data=validation,
            validation_batch_size=8,
        )
        drawn = random.random(), np.random.random(), keras.random.normal((2,))
        results.append((all_variables(model), losses, *map(float, np.hstack(drawn))))
    assert sorted(callbacks[0].history) == [0, 1]
    (before, losses, *drawn), (after, monitored, *drawn_after) = results
    assert losses == monitored and drawn == drawn_after
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow(but=["True"])
@pytest.mark.parametrize("validated", [False, True])
def test_it_sees_the_moving_averages_before_recalibrate_and_what_it_set_after(
    validated, rng
):
    model = keras.Sequential([keras.Input((T, D)), BNLSTM(U, name="lstm")])
    model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=False)
    x, y = rng.normal(3.0, 2.0, (32, T, D)), rng.normal(size=(32, U))
    first, last = NormalizationMonitor((x, y)), NormalizationMonitor((x, y), every=2)
    model.fit(
        x,
        y,
        batch_size=8,
        epochs=2,
        callbacks=[first, Recalibrate(x), last],
        validation_data=(x, y) if validated else None,
        verbose=0,
    )
    assert sorted(first.history) == [0, 1] and sorted(last.history) == [1]
    before, after = (m.history[1]["lstm"] for m in (first, last))
    assert before["mean_gap/max"] > 1e-3 and before["variance_gap/max"] > 1e-3
    # `recalibrate` is exact up to the float32 of its sums and statistics.
    assert after["mean_gap/max"] < 1e-5 and after["variance_gap/max"] < 1e-5
    assert before["gamma/mean"] == after["gamma/mean"]


def test_evaluate_records_nothing(rng):
    model = small_model()
    monitor = NormalizationMonitor(np.zeros((8, T, D)))
    x, y = rng.normal(size=(8, T, D)), rng.normal(size=(8, 1))
    model.evaluate(x, y, batch_size=8, callbacks=[monitor], verbose=0)
    assert monitor.history == {}


def test_event_files(rng, tmp_path):
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    layer = BNLSTM(U, name="lstm")
    monitor = NormalizationMonitor(
        rng.normal(size=(B, T, D)), log_dir=tmp_path / "logs", every=2
    )
    monitor.set_model(keras.Sequential([keras.Input((T, D)), layer]))
    monitor.on_train_begin()
    for epoch in range(4):
        randomize(layer, rng)
        monitor.on_epoch_begin(epoch)
        monitor.on_epoch_end(epoch)
    monitor.on_train_end()
    events = accumulators.EventAccumulator(
        str(tmp_path / "logs"), {"tensors": 0, "histograms": 0}
    )
    events.Reload()
    tags = set(events.Tags()["tensors"])
    keys = set(monitor.history[1]["lstm"])
    assert {"saturated/f", "mean_gap/max", "gamma/min"} < keys
    assert tags == {f"lstm/{key}" for key in keys} | {"lstm/gamma"}
    for key in keys:
        written = events.Tensors(f"lstm/{key}")
        assert [event.step for event in written] == [1, 3]
        values = [float(tf.make_ndarray(event.tensor_proto)) for event in written]
        expected = [monitor.history[epoch]["lstm"][key] for epoch in (1, 3)]
        assert values == pytest.approx(expected, rel=1e-6)  # written in float32
    *_, last = events.Tensors("lstm/gamma")
    edges_and_counts = tf.make_ndarray(last.tensor_proto)  # left, right, count
    gamma = np.asarray(layer.input_norm.gamma)
    assert edges_and_counts[:, 2].sum() == gamma.size
    assert gap(edges_and_counts[0, 0], gamma.min()) < 1e-6
    assert gap(edges_and_counts[-1, 1], gamma.max()) < 1e-6


# Refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"margin": 0.5}, r"`margin` must be in \(0, 0\.5\).*margin=0\.5"),
        ({"margin": True}, r"`margin` must be in \(0, 0\.5\).*margin=True"),
        ({"every": 0}, "`every` must be a positive integer.*every=0"),
        ({"log_dir": 3}, "`log_dir` must be the path of a folder.*log_dir=3"),
        ({"batch": None}, "`batch` must be one batch.*batch=None"),
        ({"batch": ()}, r"`batch` must be one batch.*batch=\(\)"),
        ({"batch": [[1.0]]}, r"`batch` must be one batch.*batch=\[\[1\.0\]\]"),
        (
            {"batch": tf.data.Dataset.from_tensors([0])},
            r"`batch` must be one batch.*next\(iter\(dataset\)\).*TensorData",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NormalizationMonitor(**{"batch": np.zeros((2, T, D)), **arguments})


def test_bad_batches_and_models(rng):
    x, _ = masked_frames(rng)
    model = masked_model(rng, BNLSTM(U, statistics="frame", name="lstm"))
    with pytest.raises(ValueError, match=r"`batch` .*valid frame for layer 'lstm'"):
        measured(model, np.full_like(x, PADDING))
    with pytest.raises(ValueError, match=r"more than one row: .* 'lstm'.*single row"):
        measured(model, x[2:3])
    x[2, 1, 0] = np.inf
    with pytest.raises(ValueError, match=r"`batch` must be finite.* 'lstm' is given"):
        measured(model, x)
    stock = keras.Sequential([keras.Input((T, D)), layers.LSTM(U)], name="stock")
    with pytest.raises(ValueError, match=r"no batch-normalised layer.*'stock'"):
        measured(stock, x)


def test_a_layer_that_is_never_built_is_named(rng):
    class Forgetful(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.idle = MGU(U, name="used"), BNLSTM(U, name="idle")

        def call(self, x):
            return self.used(x)

    model, x = Forgetful(), rng.normal(size=(B, T, D))
    model(x)
    with pytest.warns(UserWarning, match=r"never called on the batch: idle"):
        assert list(measured(model, x)) == ["used"]


def test_tensorboard_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"log_dir.*keras-bnrnn\[plots\]"):
        NormalizationMonitor(np.zeros((2, T, D)), log_dir=tmp_path)
