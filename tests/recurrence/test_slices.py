"""Loops in graphs: timestep by timestep, in slices of the batch, as one operation.

The same layer is run twice. Once its batch is large enough for the path under test.
Once the path is switched off, the loop is whole, and TensorFlow differentiates it.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import KINDS, gap, random_mask, randomize
from test_gradients import (
    EACH,
    B,
    D,
    T,
    U,
    differentiated_by_tensorflow,
    make,
    results,
    states_of,
)

from keras_bnrnn import backend, projection
from keras_bnrnn.backend.context import simple_loops
from keras_bnrnn.layers.gru import GRUGates
from keras_bnrnn.layers.lstm import LSTMDerivative, LSTMGates
from keras_bnrnn.recurrence import Weights, schedule


@pytest.fixture
def slices(monkeypatch):
    """The sizes of the slices of each call, of batches of 4 rows and more.

    Without oneDNN, which has other loops than slices.
    """
    seen = []
    plain = backend.slice_sizes

    def slice_sizes(batch, *arguments):
        seen.append(plain(batch, *arguments))
        return seen[-1]

    monkeypatch.setattr("keras_bnrnn.backend.tensorflow.cores", lambda: 2)
    monkeypatch.setattr(backend, "cores", lambda: 2)
    monkeypatch.setattr(backend, "products_by_onednn", lambda: False)
    monkeypatch.setattr(schedule, "BY_STEP_FROM", 0)
    monkeypatch.setattr(schedule, "LEAST_PRODUCT_BY_GATE", 0)
    monkeypatch.setattr(schedule, "LEAST_SLICED_ROWS", 4)
    monkeypatch.setattr(schedule, "LEAST_SLICED_PRODUCT", 0)
    monkeypatch.setattr(schedule, "LEAST_SLICED_PRODUCT_AT_INFERENCE", 0)
    monkeypatch.setattr(backend, "slice_sizes", slice_sizes)
    return seen


def differentiated(layer, training, mask=None):
    """A function of x, the states and perhaps a mask, with any number of rows.

    It returns all outputs, and gradients in x, the states and all trainable weights.
    """
    count = len(keras.tree.flatten(layer.cell.state_size))

    def function(x, *arguments):
        states = list(arguments[:count])
        (valid,) = arguments[count:] or [mask]
        weights = [w.value for w in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch([x, *states])
            outputs = layer(x, initial_state=states, mask=valid, training=training)
            loss = sum(tf.reduce_sum(tf.sin(output)) for output in outputs)
        return [*outputs, *tape.gradient(loss, [x, *states, *weights])]

    return function


def specs_of(rows, dtype, states=2):
    """Of x and the states."""
    state = tf.TensorSpec((rows, U), dtype)
    return [tf.TensorSpec((rows, T, D), dtype), *[state] * states]


def whole(monkeypatch):
    """One loop, all factors at once, and no closed forms."""
    monkeypatch.setattr(backend, "slice_sizes", lambda batch, *_: [batch])
    monkeypatch.setattr(backend, "is_traced", lambda: False)
    differentiated_by_tensorflow(monkeypatch)


@pytest.mark.slow
@EACH
def test_slices_agree_with_the_whole_batch(kind, variant, slices, rng, monkeypatch):
    """1e-11, of numbers of order 1 to 100 in float64."""
    mask = tf.constant(random_mask(rng, B, T))
    states, x = states_of(kind, rng), tf.constant(rng.normal(size=(B, T, D)))
    cases = []
    for options, m, training in (
        ({"return_sequences": True, "go_backwards": True}, mask, True),
        ({}, mask, True),
        ({"return_sequences": True}, None, True),
        ({"return_sequences": True, "statistics": "frame"}, mask, True),
        ({}, None, False),
    ):
        layer = make(kind, rng, **options, **variant)
        cases.append((layer, (x, states, m, training)))
    ours = [results(layer, "graph", *arguments) for layer, arguments in cases]
    assert slices == [[3, 3]] * len(cases)
    whole(monkeypatch)
    theirs = [results(layer, "graph", *arguments) for layer, arguments in cases]
    for our, their in zip(ours, theirs, strict=True):
        for a, b in zip(our, their, strict=True):
            assert gap(a, b) <= 1e-11


@pytest.mark.slow(but=["True-False"])
@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("masked", [True, False])
def test_four_slices_at_inference(masked, differentiated, slices, rng, monkeypatch):
    """1e-11, of numbers of order 1 to 100 in float64."""
    cycles_of_a_row = 3 * U * (U / 8 + 1 / 1.5)
    monkeypatch.setattr(schedule, "CYCLES_ON_ONE_CORE", 2.5 * cycles_of_a_row)
    monkeypatch.setattr(schedule, "LEAST_ROWS_OF_FOUR_SLICES", 1)
    mask = tf.constant(random_mask(rng, B, T)) if masked else None
    states, x = states_of("gru", rng), tf.constant(rng.normal(size=(B, T, D)))
    layer = make("gru", rng, return_sequences=True)

    def of_layer(mode):
        if differentiated:
            return results(layer, mode, x, states, mask, False)
        call = tf.function(layer, autograph=False) if mode == "graph" else layer
        return call(x, initial_state=states, mask=mask, training=False)

    ours = of_layer("graph")
    assert slices == [[2, 2, 1, 1]]
    whole(monkeypatch)
    theirs = of_layer("eager")
    assert max(gap(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1e-11


@pytest.mark.slow(but=["lstm-True", "gru-False"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_any_size(kind, training, slices, rng, monkeypatch):
    """One trace for all sizes: those below 4 rows are one loop.

    In training it is the first of two slices, at inference the branch of a condition.
    Blocks have up to 4 timesteps of one row, and one of four rows.
    """
    monkeypatch.setattr(schedule, "BLOCK_FRAMES", 4)
    layer = make(kind, rng, return_sequences=True)
    start = [w.numpy() for w in layer.weights]
    count = 2 if kind == "lstm" else 1
    spec = [
        tf.TensorSpec((None, None, D), tf.float64),
        tf.TensorSpec((None, None), tf.bool),
        *[tf.TensorSpec((None, U), tf.float64)] * count,
    ]

    def step(x, mask, *states):
        weights = [w.value for w in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch([x, *states])
            outputs = layer(x, initial_state=list(states), mask=mask, training=training)
            loss = sum(tf.reduce_sum(tf.sin(output)) for output in outputs)
        return [*outputs, *tape.gradient(loss, [x, *states, *weights])]

    ours = tf.function(step, input_signature=spec, autograph=False)
    batches = [
        (
            tf.constant(rng.normal(size=(rows, length, D))),
            tf.constant(rng.random((rows, length)) < 0.7),
            *[tf.constant(rng.normal(size=(rows, U))) for _ in range(count)],
        )
        for rows, length in ((1, 3), (3, 4), (4, 2), (7, 5))
    ]

    def all_results(function):
        found = []
        for batch in batches:
            for weight, value in zip(layer.weights, start, strict=True):
                weight.assign(value)
            found += function(*batch)
        return found

    found = all_results(ours)
    assert ours.experimental_get_tracing_count() == 1
    assert len(slices[0]) == 2
    whole(monkeypatch)
    expected = all_results(tf.function(step, input_signature=spec, autograph=False))
    assert max(gap(a, b) for a, b in zip(found, expected, strict=True)) <= 1e-11


@pytest.mark.slow(but=["False-False", "True-True"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sequences", [False, True])
def test_the_operations_of_a_block(sequences, masked, slices, rng, monkeypatch):
    """They are float32: 2e-5 of numbers of order 1, against the loop in float64."""
    mask = tf.constant(random_mask(rng, B, T)) if masked else None
    states, x = states_of("lstm", rng), tf.constant(rng.normal(size=(B, T, D)))
    double = make("lstm", rng, return_sequences=sequences)
    single = KINDS["lstm"][0](
        U, return_state=True, return_sequences=sequences, momentum=0.9
    )
    single.build((B, T, D))
    for weight, value in zip(single.weights, double.weights, strict=True):
        weight.assign(value)
    used = []
    run = backend.block_forward
    monkeypatch.setattr(backend, "block_forward", lambda *a: used.append(1) or run(*a))
    ours = results(
        single,
        "graph",
        tf.cast(x, tf.float32),
        [tf.cast(state, tf.float32) for state in states],
        mask,
        True,
    )
    assert len(used) == 1  # traced once for both slices
    assert slices == [[3, 3]]
    whole(monkeypatch)
    theirs = results(double, "graph", x, states, mask, True)
    assert len(used) == 1
    for a, b in zip(ours, theirs, strict=True):
        assert gap(a, b) <= 2e-5


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("statistics", ["sequence", "frame"])
@pytest.mark.parametrize("variant", [{}, {"activation": "gelu", "use_bias": False}])
def test_the_parts_of_a_gradient(variant, statistics, onednn, slices, rng, monkeypatch):
    """With oneDNN a GRU has three, of which two are the gradient of each product."""
    monkeypatch.setattr(backend, "products_by_onednn", lambda: onednn)
    states, x = states_of("gru", rng), tf.constant(rng.normal(size=(B, T, D)))
    layer = make("gru", rng, return_sequences=True, statistics=statistics, **variant)
    seen = []
    split = backend.split

    def recorded(x, sizes, axis):
        seen.append((axis, list(sizes)))
        return split(x, sizes, axis)

    monkeypatch.setattr(backend, "split", recorded)
    ours = results(layer, "graph", x, states, None, True)
    assert ((0, [2 * U, U]) in seen) == onednn  # the rows of transposed kernels
    whole(monkeypatch)
    theirs = results(layer, "graph", x, states, None, True)
    for a, b in zip(ours, theirs, strict=True):
        assert gap(a, b) <= 1e-11


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("statistics", ["sequence", "frame"])
@pytest.mark.parametrize("rows", [None, B])
def test_the_operation_of_a_timestep(
    rows, statistics, masked, slices, rng, monkeypatch
):
    """It is float32: 2e-5 of numbers of order 1, against the loop in float64.

    It runs where a block does not: by frame-wise statistics there is no kernel in the
    loop, and products of many weights are left to oneDNN. Not where gates run side by
    side.
    """
    monkeypatch.setattr(LSTMDerivative, "by_gate", lambda *_: None)
    monkeypatch.setattr(backend, "products_by_onednn", lambda: True)
    monkeypatch.setattr(schedule, "BLOCK_WEIGHTS_WITH_ONEDNN", 0)
    monkeypatch.setattr(schedule, "BLOCK_PRODUCT_WITH_ONEDNN", 0)
    mask = tf.constant(random_mask(rng, B, T)) if masked else None
    states, x = states_of("lstm", rng), tf.constant(rng.normal(size=(B, T, D)))
    double = make("lstm", rng, return_sequences=True, statistics=statistics)
    single = KINDS["lstm"][0](
        U,
        return_state=True,
        return_sequences=True,
        statistics=statistics,
        momentum=0.9,
    )
    single.build((B, T, D))
    for weight, value in zip(single.weights, double.weights, strict=True):
        weight.assign(value)
    used = []
    run = backend.lstm_step_gradient
    monkeypatch.setattr(
        backend, "lstm_step_gradient", lambda *a: used.append(1) or run(*a)
    )

    def found(layer):
        run = tf.function(
            differentiated(layer, True, mask),
            input_signature=specs_of(rows, layer.dtype),
            autograph=False,
        )
        return run(*[tf.cast(tensor, layer.dtype) for tensor in (x, *states)])

    ours = found(single)
    assert used and slices == [[3, 3]] if rows else len(slices[0]) == 2
    used.clear()
    whole(monkeypatch)
    theirs = found(double)
    assert not used
    for a, b in zip(ours, theirs, strict=True):
        assert gap(a, b) <= 2e-5


@pytest.mark.slow(
    but=[
        "lstm-6-frame-True",
        "lstm-None-moments-False",
        "lstm-6-projection-False",
        "gru-None-projection-True",
        "gru-6-frame-False",
    ]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("path", ["moments", "projection", "frame"])
@pytest.mark.parametrize("rows", [None, B])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gate_by_gate(kind, rows, path, masked, slices, rng, monkeypatch):
    """1e-11, of numbers of order 1 to 100 in float64.

    The gates of an LSTM run side by side. Those of a GRU have one product, and run in
    slices of the batch.

    By moments the loop projects the input, with the bias. Otherwise the input comes
    projected: normalised by the moments of the projection, which leaves the bias to the
    loop, or by those of each frame, which does not.
    """
    monkeypatch.setattr(projection, "moments_are_cheaper", lambda *_: path == "moments")
    statistics = "frame" if path == "frame" else "sequence"
    monkeypatch.setattr(backend, "products_by_onednn", lambda: True)
    mask = tf.constant(random_mask(rng, B, T)) if masked else None
    states, x = states_of(kind, rng), tf.constant(rng.normal(size=(B, T, D)))
    layer = make(
        kind,
        rng,
        return_sequences=True,
        statistics=statistics,
        recurrent_dropout=0.5,
        seed=1,
    )
    start = [w.numpy() for w in layer.weights]
    seeds = [v.numpy() for v in layer.non_trainable_variables]
    widths = []
    run = backend.sigmoid_gradient
    monkeypatch.setattr(
        backend,
        "sigmoid_gradient",
        lambda y, d: widths.append(y.shape[-1]) or run(y, d),
    )

    def found():
        for weight, value in zip(layer.weights, start, strict=True):
            weight.assign(value)
        for variable, value in zip(layer.non_trainable_variables, seeds, strict=True):
            variable.assign(value)
        function = tf.function(
            differentiated(layer, True, mask),
            input_signature=specs_of(rows, "float64", len(states)),
            autograph=False,
        )
        return function(x, *states)

    ours = found()
    assert set(widths) == {U}
    assert len(slices) == (0 if kind == "lstm" else 1)
    widths.clear()
    whole(monkeypatch)
    theirs = found()
    assert not widths
    for a, b in zip(ours, theirs, strict=True):
        assert gap(a, b) <= 1e-11


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [None, 3, B])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gate_by_gate_at_inference(kind, rows, masked, slices, rng, monkeypatch):
    """1e-11, of numbers of order 1 to 100 in float64.

    Batches of up to 3 rows run whole, larger ones in slices: those of an LSTM with all
    gates in one tensor.
    """
    monkeypatch.setattr(backend, "products_by_onednn", lambda: True)
    monkeypatch.setattr(schedule, "MOST_ROWS_BY_GATE_AT_INFERENCE", 3)
    monkeypatch.setattr(schedule, "LEAST_WEIGHTS_BY_GATE_AT_INFERENCE", 4 * U * U)
    layer = make(kind, rng, return_sequences=True)
    by_gate = []
    gates = {"lstm": LSTMGates, "gru": GRUGates}[kind]
    keep = gates.keep

    def recorded(self, projected, *rest):
        by_gate.append(len(projected))
        return keep(self, projected, *rest)

    monkeypatch.setattr(gates, "keep", recorded)
    states = 2 if kind == "lstm" else 1
    specs = specs_of(rows, "float64", states)
    if masked:
        specs.append(tf.TensorSpec((rows, T), tf.bool))
    function = differentiated(layer, False)
    call = tf.function(function, input_signature=specs, autograph=False)
    batches = []
    for size in [1, 3, 4, 7] if rows is None else [rows]:
        shapes = [(size, T, D), *[(size, U)] * states]
        batch = [tf.constant(rng.normal(size=shape)) for shape in shapes]
        batches.append([*batch, *([rng.random((size, T)) < 0.7] if masked else [])])
    ours = [call(*batch) for batch in batches]
    assert set(by_gate) == (
        set() if kind == "lstm" and rows == B else {layer.cell.gates}
    )
    counts = {None: [2], 3: [1], B: [2]}[rows]
    if kind == "lstm" and rows != B:
        counts = []
    assert [len(sizes) for sizes in slices] == counts
    by_gate.clear()
    whole(monkeypatch)
    for batch, found in zip(batches, ours, strict=True):
        expected = function(*batch)
        assert max(gap(a, b) for a, b in zip(found, expected, strict=True)) <= 1e-11
    assert not by_gate


def test_when_loops_run_by_gate(monkeypatch):
    least = schedule.LEAST_WEIGHTS_BY_GATE_AT_INFERENCE
    large = Weights(None, tf.zeros((1, least)))
    small = Weights(None, tf.zeros((1, least - 1)))
    training, inference = schedule.Schedule(), schedule.Schedule(keeps=False)
    cases = (
        (training, schedule.MOST_ROWS_BY_GATE, [large, small], []),
        (inference, schedule.MOST_ROWS_BY_GATE_AT_INFERENCE, [large], [small]),
    )
    monkeypatch.setattr(backend, "run_by_executor", lambda: True)
    monkeypatch.setattr(backend, "cores", lambda: 2)
    for onednn in (False, True):
        monkeypatch.setattr(backend, "products_by_onednn", lambda on=onednn: on)
        for plan, most, fit, do_not in cases:
            for weights in fit:
                for rows in (most, tf.constant(most + 1)):
                    assert schedule.runs_by_gate(plan, rows, weights, 4) == onednn
                    assert schedule.runs_by_gate(plan, rows, weights, 1)
                assert not schedule.runs_by_gate(plan, most + 1, weights, 4)
                company = plan._replace(has_company=True)
                assert not schedule.runs_by_gate(company, most, weights, 4)
                assert schedule.runs_by_gate(company, most + 1, weights, 1)
            for weights in do_not:
                assert not schedule.runs_by_gate(plan, most, weights, 4)
                assert schedule.runs_by_gate(plan, most, weights, 1)
    monkeypatch.setattr(backend, "products_by_onednn", lambda: True)
    fewest = -(-schedule.LEAST_PRODUCT_BY_GATE // least)
    assert schedule.runs_by_gate(training, fewest, large, 4)
    assert not schedule.runs_by_gate(training, fewest - 1, large, 4)
    assert schedule.runs_by_gate(training, fewest - 1, large, 1)
    for name, value in (("run_by_executor", False), ("cores", 1)):
        with monkeypatch.context() as patched:
            patched.setattr(backend, name, lambda value=value: value)
            assert not schedule.runs_by_gate(training, fewest, large, 4)
            assert schedule.runs_by_gate(training, 1, large, 1) == (name == "cores")


def test_a_block_of_any_size(slices, rng, monkeypatch):
    """One trace: the gradient of a block is one operation, or a loop, by rows.

    One row: one operation. 2 and 3: a loop. 4 to 6: two operations. 7: a loop of 4 rows
    beside an operation of 3. All are float32: 2e-5 of numbers of order 1, against the
    loop in float64.
    """
    product = (D + U) * 4 * U
    monkeypatch.setattr(schedule, "ONE_OPERATION_ALONE", 2 * product - 1)
    monkeypatch.setattr(schedule, "ONE_OPERATION_IN_SLICES", 3 * product)
    double = make("lstm", rng, return_sequences=True)
    start = [w.numpy() for w in double.weights]
    single = KINDS["lstm"][0](U, return_state=True, return_sequences=True, momentum=0.9)
    single.build((B, T, D))

    def gradients(layer):
        def step(x):
            weights = [w.value for w in layer.trainable_variables]
            with tf.GradientTape() as tape:
                tape.watch(x)
                outputs = layer(x, training=True)
                loss = sum(tf.reduce_sum(tf.sin(output)) for output in outputs)
            return [*outputs, *tape.gradient(loss, [x, *weights])]

        spec = [tf.TensorSpec((None, None, D), layer.dtype)]
        function = tf.function(step, input_signature=spec, autograph=False)
        found = []
        for batch in batches:
            for weight, value in zip(layer.weights, start, strict=True):
                weight.assign(value)
            found.append(function(tf.cast(batch, layer.dtype)))
        assert function.experimental_get_tracing_count() == 1
        return found

    batches = [tf.constant(rng.normal(size=(rows, T, D))) for rows in (1, 2, 3, 4, 7)]
    found = gradients(single)
    whole(monkeypatch)
    for ours, theirs in zip(found, gradients(double), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert gap(a, b) <= 2e-5


@pytest.mark.parametrize("training", [False, True])
def test_two_directions_are_two_loops(training, slices, rng):
    """Two loops at the same time leave no core for slices; blocks are no such loops."""
    x = tf.constant(rng.normal(size=(B, T, D)), tf.float32)
    for kind in ("gru", "lstm"):
        layer = keras.layers.Bidirectional(KINDS[kind][0](U))
        layer.build(x.shape)
        tf.function(lambda x, layer=layer: layer(x, training=training))(x)
        assert slices == ([[3, 3]] * 2 if kind == "lstm" and training else [])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_second_derivatives_of_slices(kind, slices, rng, monkeypatch):
    """Of slices (of blocks in an LSTM) and of the whole batch, both float32.

    1e-4 of numbers of order 1 to 10.
    """
    layer = KINDS[kind][0](U, return_sequences=True)
    layer.build((B, T, D))
    randomize(layer, rng)
    x = tf.constant(rng.normal(size=(B, T, D)), tf.float32)
    start = [w.numpy() for w in layer.weights]

    def penalty():
        for weight, value in zip(layer.weights, start, strict=True):
            weight.assign(value)
        weights = [w.value for w in layer.trainable_variables]

        @tf.function(autograph=False)
        def second(x):
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    loss = tf.reduce_sum(tf.sin(layer(x, training=True)))
                squares = tf.reduce_sum(inner.gradient(loss, x) ** 2)
            return outer.gradient(squares, weights)

        return second(x)

    ours = penalty()
    assert slices == [[3, 3]]
    whole(monkeypatch)
    for a, b in zip(ours, penalty(), strict=True):
        assert gap(a, b) <= 1e-4


@pytest.mark.slow
def test_a_nested_function_and_recomputation(slices, rng, monkeypatch):
    """The tensors that the loop keeps pass the borders of functions."""
    layer = make("gru", rng, return_sequences=True)
    x, states = tf.constant(rng.normal(size=(B, T, D))), states_of("gru", rng)
    plain = results(layer, "graph", x, states, None, True)
    call = layer.call
    for wrap in (tf.function, tf.recompute_grad):
        inner = wrap(lambda x, *s: call(x, initial_state=list(s), training=True))

        def through(x, initial_state, mask, training, inner=inner):
            return inner(x, *initial_state)

        start = [w.numpy() for w in layer.weights]
        weights = [layer.cell.kernel.value, layer.cell.recurrent_kernel.value]

        @tf.function(autograph=False)
        def step(x, *states, through=through, weights=weights):
            with tf.GradientTape() as tape:
                tape.watch(x)
                outputs = through(x, states, None, True)
                loss = 0.0
                for i, output in enumerate(outputs):
                    factors = np.random.default_rng(3 + i).normal(size=output.shape)
                    loss += tf.reduce_sum(tf.sin(output) * factors)
            return [*outputs, *tape.gradient(loss, [x, *weights])]

        found = step(x, *states)
        for weight, value in zip(layer.weights, start, strict=True):
            weight.assign(value)
        order = [w.path for w in layer.trainable_variables]
        position = len(found) - 3 + 1 + len(states)
        expected = [
            *plain[: len(found) - 2],
            plain[position + order.index(layer.cell.kernel.path)],
            plain[position + order.index(layer.cell.recurrent_kernel.path)],
        ]
        assert max(gap(a, b) for a, b in zip(found, expected, strict=True)) <= 1e-11


def test_small_batches_and_single_cores_are_not_sliced(monkeypatch):
    @tf.function(autograph=False)
    def sizes(batch, least):
        found.append(backend.slice_sizes(batch, least))
        return tf.constant(0)

    found = []
    monkeypatch.setattr("keras_bnrnn.backend.tensorflow.cores", lambda: 2)
    sizes(7, 8), sizes(9, 8)
    monkeypatch.setattr("keras_bnrnn.backend.tensorflow.cores", lambda: 1)
    sizes(10, 8)
    monkeypatch.setattr("keras_bnrnn.backend.tensorflow.cores", lambda: 2)
    with simple_loops():
        sizes(11, 8)
    sizes(12, 8)
    assert found == [[7], [5, 4], [10], [11], [6, 6]]
    assert backend.slice_sizes(64, 8) == [64]  # an eager call
