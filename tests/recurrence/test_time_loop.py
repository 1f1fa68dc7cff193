"""The time loop with a cell that is defined here, against a NumPy loop in float64.

The cell has two states, c' = rate c + a and h' = a c', with the pre-activation
a = tanh(projected + recurrent + peephole c).
"""

import functools
import importlib
import itertools

import numpy as np
import pytest
import tensorflow as tf
from helpers import gap

from keras_bnrnn import backend
from keras_bnrnn.recurrence import (
    Loop,
    Schedule,
    StepDerivative,
    Weights,
    forward,
    schedule,
    time_loop,
)

T, B, D, U = 7, 4, 3, 2
RATE = 0.5
PLAIN = Schedule()
NAMES = ["frames", "h", "c", "kernel", "recurrent_kernel", "bias", "peephole"]


def draw(rng):
    """Arrays of the arguments, by name."""
    shapes = [(T, B, D), (B, U), (B, U), (D, U), (U, U), (U,), (U,)]
    return {n: rng.normal(size=s) for n, s in zip(NAMES, shapes, strict=True)}


# The oracle


def numpy_loop(a, lengths=None, dropped=1.0):
    """Outputs (T, B, U), and the states at the end of each row."""
    h, c, outputs = a["h"], a["c"], []
    for t in range(T):
        projected = a["frames"][t] @ a["kernel"] + a["bias"]
        recurrent = (h * dropped) @ a["recurrent_kernel"]
        activation = np.tanh(projected + recurrent + a["peephole"] * c)
        new_c = RATE * c + activation
        new_h = activation * new_c
        if lengths is not None:
            valid = (t < lengths)[:, None]
            new_h, new_c = np.where(valid, new_h, h), np.where(valid, new_c, c)
        h, c = new_h, new_c
        outputs.append(h)
    return np.stack(outputs), [h, c]


def slopes_of(value, arrays, along):
    """The derivative of `value` along a direction in each argument.

    By a complex step, which cancels no digits.
    """
    return np.array(
        [
            value({**arrays, name: arrays[name] + 1e-30j * along[name]}).imag / 1e-30
            for name in NAMES
        ]
    )


# The cell


def step(projected, recurrent, states, weights, valid):
    _, c = states
    a = tf.tanh(projected + recurrent + weights.more["peephole"] * c)
    new_c = RATE * c + a
    return [a * new_c, new_c], []


class Derivative(StepDerivative):
    def widths(self, units):
        return [units]

    def width(self, units):
        return units

    def keep(self, projected, recurrent, states, weights):
        return [tf.tanh(projected + recurrent + weights.more["peephole"] * states[1])]

    def advance(self, kept, states, weights):
        new_c = RATE * states[1] + kept[0]
        return [kept[0] * new_c, new_c]

    def factors(self, kept, before, after, weights):
        (a,) = kept
        slope = 1.0 - a * a
        return [a, after[1], slope, slope * weights.more["peephole"]]

    def pull_back(self, gradients, factors):
        (dh, dc), (a, c, slope, through_c) = gradients, factors
        dc = dc + dh * a
        da = dc + dh * c
        return da * slope, [None, RATE * dc + da * through_c]

    def of_weights(self, parts, before, after, weights):
        (gradient,) = parts
        return {"peephole": tf.reduce_sum(gradient * before[1], axis=[0, 1])}


def weights_of(tensors, dropped=None):
    return Weights(
        tensors["kernel"],
        tensors["recurrent_kernel"],
        tensors["bias"],
        {"peephole": tensors["peephole"]},
        dropped,
    )


def loop_of(lengths=None, **fields):
    valid = None
    if lengths is not None:
        valid = tf.constant(np.arange(T)[:, None, None] < lengths[None, :, None])
    return Loop(step, lambda w: w.recurrent_kernel, valid, **fields)


def run(tensors, lengths=None, schedule=PLAIN, dropped=None, bounded=True, **more):
    """Calls `time_loop`; returns outputs and states."""
    outputs, states, _ = time_loop(
        loop_of(lengths, bounded=bounded, schedule=schedule),
        tensors["frames"],
        [tensors["h"], tensors["c"]],
        weights_of(tensors, dropped),
        None if lengths is None else tf.constant(lengths, tf.int32),
        **more,
    )
    return outputs, states


def constants(arrays):
    return {name: tf.constant(array) for name, array in arrays.items()}


# Outputs and gradients

LENGTHS = np.array([T, 0, 1, 3])
OPTIONS = [
    {},
    {"lengths": LENGTHS},
    {"lengths": LENGTHS, "bounded": False},
    {"return_sequences": False},
    {"lengths": LENGTHS, "return_sequences": False},
    {"lengths": LENGTHS, "wants_states": False},
    {"lengths": LENGTHS, "wants_states": False, "return_sequences": False},
    {"schedule": Schedule(unroll=True)},
    {"schedule": Schedule(unroll=True), "lengths": LENGTHS},
    {"schedule": Schedule(keeps=False)},
    {"schedule": Schedule(keeps=False, reads_ahead=True), "lengths": LENGTHS},
    {"dropped": np.random.default_rng(0).integers(0, 2, (B, U)) * 2.0},
]
IDS = ["-".join(sorted(options)) or "plain" for options in OPTIONS]


def losses(rng, options):
    """A weighed sum of outputs and states, in NumPy and in TensorFlow.

    Outputs past the end of a row, and states that are not wanted, weigh nothing.
    """
    weights = rng.normal(size=(T, B, U)), rng.normal(size=(2, B, U))
    if not options.get("return_sequences", True):
        weights[0][:] = 0.0
    if "lengths" in options:
        weights[0][np.arange(T)[:, None] >= options["lengths"]] = 0.0
    if not options.get("wants_states", True):
        weights[1][1] = 0.0

    def in_numpy(arrays):
        outputs, states = numpy_loop(
            arrays, options.get("lengths"), options.get("dropped", 1.0)
        )
        return np.sum(outputs * weights[0]) + np.sum(np.stack(states) * weights[1])

    def in_tensorflow(tensors, **closed_form):
        outputs, states = run(tensors, **options, **closed_form)
        loss = tf.reduce_sum(tf.stack(states) * weights[1])
        if outputs is None:
            return loss
        return loss + tf.reduce_sum(outputs * weights[0])

    return in_numpy, in_tensorflow


@pytest.mark.parametrize(
    "graph, options",
    [(False, options) for options in OPTIONS]
    + [(True, options) for options in (OPTIONS[1], OPTIONS[2], OPTIONS[3], OPTIONS[9])],
    ids=IDS + ["graph-lengths", "graph-bounded", "graph-states", "graph-schedule"],
)
@pytest.mark.parametrize("closed_form", [False, True])
def test_outputs_and_gradients(closed_form, graph, options, rng, monkeypatch):
    """1e-13 of outputs of order 1, and of gradients of order 1 to 100 in float64."""
    monkeypatch.setattr(schedule, "BY_STEP_FROM", 0)
    arrays, along = draw(rng), draw(rng)
    more = {"derivative": Derivative() if closed_form else None}

    def outputs_and_states(tensors):
        return run(tensors, **options, **more)

    in_numpy, in_tensorflow = losses(rng, options)

    def slopes(tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = in_tensorflow(tensors, **more)
        gradients = tape.gradient(loss, tensors)
        return tf.stack([tf.reduce_sum(gradients[n] * along[n]) for n in NAMES])

    if graph:
        outputs_and_states = tf.function(outputs_and_states, autograph=False)
        slopes = tf.function(slopes, autograph=False)
    outputs, states = outputs_and_states(constants(arrays))
    lengths = options.get("lengths")
    expected, expected_states = numpy_loop(arrays, lengths, options.get("dropped", 1.0))
    assert (outputs is not None) == options.get("return_sequences", True)
    if outputs is not None:
        valid = np.ones((T, B)) if lengths is None else np.arange(T)[:, None] < lengths
        assert outputs.shape == expected.shape and np.all(np.isfinite(outputs))
        assert gap(outputs[valid == 1], expected[valid == 1]) <= 1e-13
    assert len(states) == 2
    wanted = 2 if options.get("wants_states", True) else 1
    assert gap(states[:wanted], expected_states[:wanted]) <= 1e-13
    found = slopes(constants(arrays))
    expected = slopes_of(in_numpy, arrays, along)
    assert gap(found, expected) <= 1e-13 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(
    "options",
    [{}, {"lengths": LENGTHS}, {"lengths": LENGTHS, "return_sequences": False}],
    ids=["plain", "lengths", "states"],
)
def test_second_derivatives(options, rng):
    """Of `sum(gradient * along)`, by central differences of the first: 1e-6.

    The step of 1e-6 leaves 1e-10 of rounding and 1e-12 of third derivatives.
    """
    arrays, along, direction = draw(rng), draw(rng), draw(rng)
    _, in_tensorflow = losses(rng, options)

    def first(tensors, **more):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss = in_tensorflow(tensors, **more)
        gradients = tape.gradient(loss, tensors)
        return sum(tf.reduce_sum(gradients[n] * along[n]) for n in NAMES)

    tensors = constants(arrays)
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        total = first(tensors, derivative=Derivative())
    second = tape.gradient(total, tensors)
    found = [np.sum(second[n] * direction[n]) for n in NAMES]

    expected = []
    for name in NAMES:
        ahead, behind = (
            first(constants({**arrays, name: arrays[name] + shift * direction[name]}))
            for shift in (1e-6, -1e-6)
        )
        expected.append((ahead - behind) / 2e-6)
    assert gap(found, expected) <= 1e-6 * max(1.0, np.abs(expected).max())


def test_sequences_and_all_states_are_returned_by_default(rng):
    outputs, states, collected = time_loop(
        loop_of(),
        tf.constant(draw(rng)["frames"]),
        [tf.zeros((B, U), tf.float64)] * 2,
        weights_of(constants(draw(rng))),
    )
    assert outputs.shape == (T, B, U) and len(states) == 2 and collected == []
    assert gap(outputs[-1], states[0]) == 0.0


def test_the_default_of_loop_and_schedule():
    loop = Loop(step, None)
    assert loop[2:] == (None, False, False, (), None, True, Schedule())
    assert Schedule() == (False, True, False, False, False, None, 1)


def test_collected_tensors_are_stacked(rng):
    def collecting(projected, recurrent, states, weights, valid):
        new, _ = step(projected, recurrent, states, weights, valid)
        return new, [tf.reduce_mean(new[1], axis=0), new[0] * 2.0]

    arrays = draw(rng)
    loop = loop_of()._replace(
        step=collecting, collected=[((U,), "float64"), ((B, U), "float64")]
    )
    tensors = constants(arrays)
    for wrap in (lambda f: f, lambda f: tf.function(f, autograph=False)):
        outputs, _, (means, twice) = wrap(
            lambda: time_loop(
                loop,
                tensors["frames"],
                [tensors["h"], tensors["c"]],
                weights_of(tensors),
            )
        )()
        assert means.shape == (T, U)
        assert gap(means[-1], np.mean(numpy_loop(arrays)[1][1], 0)) <= 1e-13
        assert gap(twice, 2.0 * outputs) == 0.0


def test_the_projected_input_needs_no_kernel(rng):
    arrays = draw(rng)
    projected = {**arrays, "frames": arrays["frames"] @ arrays["kernel"]}
    tensors = {**constants(projected), "kernel": None}
    assert gap(run(tensors)[0], numpy_loop(arrays)[0]) <= 1e-13
    inputs, weights = forward.projected(tensors["frames"], weights_of(tensors))
    assert inputs is tensors["frames"] and weights.bias is tensors["bias"]


def test_only_a_graph_adds_the_bias_to_the_projection(rng):
    arrays = draw(rng)
    tensors = constants(arrays)
    product = arrays["frames"] @ arrays["kernel"]
    found, weights = forward.projected(tensors["frames"], weights_of(tensors))
    assert weights.kernel is None and weights.bias is tensors["bias"]
    assert gap(found, product) <= 1e-13

    @tf.function(autograph=False)
    def in_graph(bias):
        found, weights = forward.projected(
            tensors["frames"], weights_of({**tensors, "bias": bias})
        )
        assert weights.kernel is None and weights.bias is None
        return found

    assert gap(in_graph(tensors["bias"]), product + arrays["bias"]) <= 1e-13
    assert gap(in_graph(None), product) <= 1e-13


# Past the end of a row


def past_the_end(arrays, clears):
    """Outputs past the end of a row: of states of 0, or of the row's last states."""
    first = arrays["frames"][0] @ arrays["kernel"] + arrays["bias"]
    if clears:
        return np.broadcast_to(np.tanh(first) ** 2, (T, B, U))
    return numpy_loop(arrays)[0]


@pytest.mark.parametrize("bounded", [False, True])
def test_states_that_may_overflow_are_cleared_past_the_end(bounded, rng):
    arrays = draw(rng)
    outputs, _ = run(constants(arrays), LENGTHS, bounded=bounded)
    past = np.arange(T)[:, None] >= LENGTHS
    expected = past_the_end(arrays, clears=not bounded)
    assert gap(outputs[past], expected[past]) <= 1e-13


def test_nothing_overflows_past_the_end(rng):
    """A state that grows by 1e200 a timestep, and its gradients."""

    def growing(projected, recurrent, states, weights, valid):
        new, _ = step(projected, recurrent, states, weights, valid)
        return [new[0], 1e200 * states[1] + new[1]], []

    lengths = np.array([1, 1, 0, 1])
    tensors = constants(draw(rng))
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        _, states, _ = time_loop(
            loop_of(lengths)._replace(step=growing),
            tensors["frames"],
            [tensors["h"], tensors["c"]],
            weights_of(tensors),
            tf.constant(lengths, tf.int32),
        )
        loss = tf.reduce_sum(states[0])
    for gradient in tape.gradient(loss, tensors).values():
        assert np.all(np.isfinite(gradient))


def test_the_step_reads_what_is_valid_if_it_asks(rng):
    seen = []

    def watching(projected, recurrent, states, weights, valid):
        seen.append(valid)
        return step(projected, recurrent, states, weights, valid)

    tensors = constants(draw(rng))
    for masked, bounded, reads in itertools.product([False, True], repeat=3):
        seen.clear()
        loop = loop_of(LENGTHS if masked else None, schedule=Schedule(unroll=True))
        time_loop(
            loop._replace(step=watching, step_reads_valid=reads, bounded=bounded),
            tensors["frames"],
            [tensors["h"], tensors["c"]],
            weights_of(tensors),
        )
        assert len(seen) == T
        for t, valid in enumerate(seen):
            if masked and (reads or not bounded):
                np.testing.assert_array_equal(valid[:, 0], t < LENGTHS)
            else:
                assert valid is None


# How the loop runs


@pytest.fixture
def calls(monkeypatch):
    """The options of each call of `backend.scan`."""
    seen = []
    scan = backend.scan

    def recorded(*arguments, **options):
        seen.append(options)
        return scan(*arguments, **options)

    monkeypatch.setattr(backend, "scan", recorded)
    return seen


@pytest.mark.parametrize("graph", [False, True])
def test_options_of_the_forward_loop(graph, calls, rng, monkeypatch):
    """What is read as slices, what is read ahead, and what is left unstacked."""
    monkeypatch.setattr(schedule, "BY_STEP_FROM", 0)
    tensors = constants(draw(rng))
    for keeps, ahead, closed_form in itertools.product([False, True], repeat=3):
        calls.clear()
        options = Schedule(keeps=keeps, reads_ahead=ahead)
        derivative = Derivative() if closed_form else None

        def call(options=options, derivative=derivative):
            return run(tensors, schedule=options, derivative=derivative)

        (tf.function(call, autograph=False) if graph else call)()
        (found,) = calls
        keeps = keeps and closed_form
        assert found["differentiable"] == (not closed_form)
        assert bool(found["ahead"]) == (ahead and closed_form and not keeps)
        assert found["stacks"] == (1 if keeps and graph else None)
        assert found["unroll"] is False and found["turns"] is None


@pytest.mark.parametrize("keeps", [False, True])
def test_only_what_is_returned_is_stacked(keeps, rng, monkeypatch):
    """The first state, if the last ones of the others are not wanted."""
    stacks = []
    plain = forward.run

    def recorded(loop, projected, states, weights, count=1, *rest, **options):
        stacks.append(count)
        return plain(loop, projected, states, weights, count, *rest, **options)

    monkeypatch.setattr(forward, "run", recorded)
    tensors = constants(draw(rng))
    for expected, lengths, options in (
        (0, None, {"return_sequences": False}),
        (1, None, {}),
        (2, LENGTHS, {}),
        (1, LENGTHS, {"wants_states": False}),
    ):
        for derivative in (None, Derivative()):
            stacks.clear()
            given = {"schedule": Schedule(keeps=keeps), "derivative": derivative}
            run(tensors, lengths, **given, **options)
            assert stacks == [expected]


def test_the_loop_stacks_one_state_by_default(rng):
    tensors = constants(draw(rng))
    projected = tensors["frames"] @ tensors["kernel"]
    sequences, last, kept, collected = forward.run(
        loop_of(),
        projected,
        [tensors["h"], tensors["c"]],
        weights_of(tensors)._replace(kernel=None),
    )
    assert len(sequences) == 1 and len(last) == 2
    assert kept is None and collected == []


@pytest.mark.parametrize("by_step", [False, True])
def test_a_training_loop_keeps_its_states_once(by_step, rng):
    """After each step, with the outputs; or before it, in tensors left unstacked."""
    tensors = constants(draw(rng))
    kept = []

    @tf.function(autograph=False)
    def call():
        sequences, _, found, _ = forward.run(
            loop_of(schedule=Schedule(by_step=by_step)),
            tensors["frames"] @ tensors["kernel"],
            [tensors["h"], tensors["c"]],
            weights_of(tensors)._replace(kernel=None),
            1,
            Derivative(),
            keeps=True,
        )
        kept.append(found)
        return sequences

    graph = call.get_concrete_function().graph.as_graph_def()
    (kept,) = kept
    assert kept.by_step == by_step
    assert (len(kept.values), len(kept.states), len(kept.last)) == (1, 2, 2)
    kinds = {tensor.dtype for tensor in [*kept.values, *kept.states]}
    assert kinds == {tf.variant if by_step else tf.float64}
    stacks = sum(node.op == "TensorListStack" for node in graph.node)
    assert stacks == (1 if by_step else 3)


def test_a_gradient_runs_the_forward_loop_again_if_it_kept_nothing(rng, monkeypatch):
    loops = []
    plain = forward.run
    monkeypatch.setattr(
        forward, "run", lambda *a, **k: loops.append(k) or plain(*a, **k)
    )
    for keeps in (False, True):
        loops.clear()
        tensors = constants(draw(rng))
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            outputs, _ = run(
                tensors, schedule=Schedule(keeps=keeps), derivative=Derivative()
            )
        before = len(loops)
        tape.gradient(outputs, tensors)
        assert (before, len(loops)) == ((1, 1) if keeps else (1, 2))


# Slices


@pytest.fixture
def slices(monkeypatch):
    """What is asked about slices, the sizes of each loop, and the turns of slices."""
    seen = {"asked": [], "sizes": None, "loops": [], "turns": []}
    module = importlib.import_module("keras_bnrnn.recurrence.time_loop")
    plain, plain_slices = module._Run.__call__, module._slices

    def slice_sizes(batch, least, count):
        seen["asked"].append((batch, least))
        return seen["sizes"] or [batch]

    def recorded(self, loop, inputs, *arguments):
        seen["loops"].append(inputs.shape[1])
        return plain(self, loop, inputs, *arguments)

    def sliced(*arguments):
        slices = plain_slices(*arguments)
        seen["turns"] = [loop.turns for loop, *_ in slices]
        return slices

    monkeypatch.setattr(backend, "slice_sizes", slice_sizes)
    monkeypatch.setattr(schedule, "LEAST_SLICED_PRODUCT", 9 * U * U)
    monkeypatch.setattr(schedule, "LEAST_SLICED_PRODUCT_AT_INFERENCE", 9 * U * U)
    monkeypatch.setattr(module._Run, "__call__", recorded)
    monkeypatch.setattr(module, "_slices", sliced)
    return seen


class DoubledDerivative(Derivative):
    """Of a step that doubles the recurrent product. It declares no parts."""

    def keep(self, projected, recurrent, states, weights):
        return super().keep(projected, 2.0 * recurrent, states, weights)

    def of_recurrent(self, gradient):
        return 2.0 * gradient

    def of_weights(self, parts, before, after, weights):
        return super().of_weights([parts[0] / 2.0], before, after, weights)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("by_step", [False, True])
def test_two_gradients_without_parts(by_step, onednn, rng, monkeypatch):
    """1e-13 of gradients of order 1 to 100 in float64."""
    monkeypatch.setattr(schedule, "BY_STEP_FROM", 0 if by_step else 1024)
    monkeypatch.setattr(backend, "products_by_onednn", lambda: onednn)
    tensors = constants(draw(rng))

    def doubled(projected, recurrent, *rest):
        return step(projected, 2.0 * recurrent, *rest)

    def gradients(derivative, tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            outputs, states, _ = time_loop(
                loop_of()._replace(step=doubled),
                tensors["frames"],
                [tensors["h"], tensors["c"]],
                weights_of(tensors),
                derivative=derivative,
            )
            loss = sum(tf.reduce_sum(tf.sin(x)) for x in [outputs, *states])
        return tape.gradient(loss, tensors)

    found, expected = (
        tf.function(functools.partial(gradients, derivative), autograph=False)(tensors)
        for derivative in (DoubledDerivative(), None)
    )
    for name in NAMES:
        scale = max(1.0, np.abs(expected[name]).max())
        assert gap(found[name], expected[name]) <= 1e-13 * scale, name


@pytest.mark.parametrize("closed_form", [False, True])
def test_slices_of_an_eager_batch(closed_form, slices, rng):
    tensors = constants(draw(rng))
    for options in OPTIONS:
        more = {"derivative": Derivative() if closed_form else None, **options}
        if "dropped" in more:
            more["dropped"] = tf.constant(more["dropped"])
        unrolled = options.get("schedule", PLAIN).unroll
        slices.update(asked=[], sizes=None, loops=[], turns=[])
        whole = run(tensors, **more)
        assert slices["asked"] == ([] if unrolled else [(B, 9)])
        slices["sizes"] = [3, 1]
        found = run(tensors, **more)
        sizes = [B] if unrolled else [3, 1]
        assert slices["loops"] == [B, *sizes]
        assert slices["turns"] == ([] if unrolled else [None, None])
        assert (found[0] is None) == (whole[0] is None)
        if found[0] is not None:
            assert gap(found[0], whole[0]) <= 1e-14
        states = 2 if options.get("wants_states", True) else 1
        assert gap(found[1][:states], whole[1][:states]) <= 1e-14


def test_a_loop_that_collects_is_whole(slices, rng):
    tensors = constants(draw(rng))
    loop = loop_of()._replace(
        step=lambda *a: (step(*a)[0], [tf.zeros(1)]), collected=[((1,), "float32")]
    )
    time_loop(
        loop, tensors["frames"], [tensors["h"], tensors["c"]], weights_of(tensors)
    )
    assert slices["asked"] == []


@pytest.mark.parametrize("keeps", [False, True])
def test_a_batch_of_unknown_size(keeps, slices, rng):
    """A condition chooses at inference. In training the second slice may be empty."""
    arrays = draw(rng)
    expected, expected_states = numpy_loop(arrays)
    spec = {name: tf.TensorSpec(a.shape, tf.float64) for name, a in arrays.items()}
    spec["frames"] = tf.TensorSpec((T, None, D), tf.float64)
    spec["h"] = spec["c"] = tf.TensorSpec((None, U), tf.float64)
    least = 3

    @tf.function(input_signature=[spec], autograph=False)
    def call(tensors):
        batch = tf.shape(tensors["frames"])[1]
        second = tf.where(batch < least, 0, batch // 2)
        slices["sizes"] = [batch - second, second]
        options = {"schedule": Schedule(keeps=keeps), "derivative": Derivative()}
        outputs, states = run(tensors, **options)
        return outputs, states, slices["turns"] if keeps else []

    for rows, both in ((1, [T, 0]), (4, [T, T])):
        some = {**arrays, "frames": arrays["frames"][:, :rows]}
        some |= {"h": arrays["h"][:rows], "c": arrays["c"][:rows]}
        outputs, states, turns = call(constants(some))
        assert gap(outputs, expected[:, :rows]) <= 1e-13
        assert gap(states, [s[:rows] for s in expected_states]) <= 1e-13
        assert [int(n) for n in turns] == (both if keeps else [])
    assert len(slices["asked"]) == 1
    graph = call.get_concrete_function().graph.as_graph_def()
    # In training, two calls of one function with a loop.
    functions = {f.signature.name: f.node_def for f in graph.library.function}
    called = [node.attr["f"].func.name for node in graph.node if "f" in node.attr]
    assert whiles(graph.node) == 0
    assert len(called) == (2 if keeps else 0)
    assert [whiles(functions[name]) for name in {*called}] == ([1] if keeps else [])
    branches = {
        branch: whiles(nodes)
        for name, nodes in functions.items()
        for branch in ("true", "false")
        if f"cond_{branch}" in name
    }
    # Two loops for the slices. Of one for the whole batch, four of the seven timesteps
    # are a turn, and another loop runs the last three.
    assert branches == ({} if keeps else {"true": 2, "false": 2})


def whiles(nodes):
    """The number of loops among the nodes of a graph."""
    return sum(node.op.endswith("While") for node in nodes)


# The schedule


def test_when_factors_are_computed_by_step(monkeypatch):
    """In a graph or by XLA, without cuDNN; in a plain graph from 1,024 numbers on."""
    state = {}
    for name in ("is_traced", "has_fused_kernels", "in_plain_graph"):
        monkeypatch.setattr(backend, name, lambda name=name: state[name])
    for traced, plain, fused, unroll in itertools.product([False, True], repeat=4):
        state.update(is_traced=traced, in_plain_graph=plain, has_fused_kernels=fused)
        for batch, units in ((16, 64), (1023, 1), (33, 31), (None, 2)):
            large = batch is None or batch * units >= 1024
            rows = tf.constant(5) if batch is None else batch
            found = Schedule(unroll=unroll).settled(T, rows, units)
            assert found.by_step == (
                traced and not fused and not unroll and (large or not plain)
            )
            assert found.unroll == unroll


def test_the_timesteps_of_a_turn(monkeypatch):
    """A divisor of T if there is one; 4 if not, or if T is unknown."""
    unknown = tf.constant(35)
    cases = (100, 4), (60, 4), (35, 5), (27, 3), (3, 3), (97, 4), (1, 4), (unknown, 4)
    for runs in (False, True):
        monkeypatch.setattr(backend, "run_by_executor", lambda runs=runs: runs)
        for timesteps, length in cases:
            found = Schedule().settled(timesteps, 32, 64).turn_length
            assert found == (length if runs else 1)


def test_the_loop_settles_its_schedule(rng, monkeypatch):
    seen = []
    settled = Schedule.settled
    monkeypatch.setattr(
        Schedule, "settled", lambda self, *a: seen.append(a) or settled(self, *a)
    )
    run(constants(draw(rng)))
    assert seen == [(T, B, U)]


@pytest.mark.parametrize(
    "units, gates, rows", [(64, 4, 64), (60, 4, 73), (128, 4, 16), (512, 4, 8)]
)
def test_the_least_rows_of_slices(units, gates, rows):
    """2 ** 20 multiplications of a recurrent product, rounded up, and 8 rows."""
    weights = Weights(None, tf.zeros((units, gates * units)))
    assert schedule.slices_of(weights) == (rows, range(0))


@pytest.mark.parametrize("units, rows", [(64, 32), (32, 32), (16, 128), (128, 16)])
def test_the_least_rows_of_slices_of_a_block(units, rows):
    """2 ** 17 multiplications of a recurrent product and 32 rows, or as above."""
    weights = Weights(None, tf.zeros((units, 4 * units)))
    assert schedule.slices_of(weights, is_block=True) == (rows, range(0))


@pytest.mark.parametrize(
    "units, gates, two_from, four",
    [
        (64, 4, 32, range(189, 377)),
        (64, 3, 43, range(253, 505)),
        (128, 4, 8, range(49, 97)),
        (256, 4, 8, range(0)),
    ],
)
def test_slices_at_inference(units, gates, two_from, four, monkeypatch):
    """2 ** 19 multiplications for two slices, and four slices where TensorFlow splits
    the products of two, but not of four: 210,000 cycles of 8 multiplications each, and
    8 for every 12 results. oneDNN does not split them."""
    weights = Weights(None, tf.zeros((units, gates * units)))
    monkeypatch.setattr(backend, "products_by_onednn", lambda: True)
    assert schedule.slices_of(weights, keeps=False) == (two_from, range(0))
    monkeypatch.setattr(backend, "products_by_onednn", lambda: False)
    assert schedule.slices_of(weights, keeps=False) == (two_from, four)
    if four:
        for rows, fits in ((four[0] - 1, 2), (four[0], None), (four[-1], 4)):
            results = -(-rows // (fits or 2)) * gates * units
            cycles = results * units / 8 + results * 8 / 12
            assert (cycles <= 210_000) == (fits is not None)


@pytest.mark.parametrize("alone, most", [(True, 8), (False, 32)])
def test_when_a_gradient_is_one_operation(alone, most):
    """2 ** 18 multiplications of the products of a timestep, 2 ** 20 of a slice.

    And no more than 2 ** 15 weights.
    """
    kernels = tf.zeros((60, 256)), tf.zeros((68, 256))
    for rows, expected in ((most, True), (most + 1, False)):
        assert schedule.runs_in_one_operation(rows, alone, *kernels) is expected
        found = schedule.runs_in_one_operation(tf.constant(rows), alone, *kernels)
        assert bool(found) == expected
        found = schedule.runs_in_one_operation(rows, tf.constant(alone), *kernels)
        assert bool(found) == expected
    more = tf.zeros((61, 256)), tf.zeros((68, 256))
    assert schedule.runs_in_one_operation(tf.constant(1), alone, *more) is False


def test_the_timesteps_of_a_block():
    """2,048 frames, rounded down, and at least one timestep."""
    for rows, timesteps in ((0, 2048), (1, 2048), (3, 682), (2048, 1), (5000, 1)):
        assert schedule.timesteps_of_block(rows) == timesteps
        assert schedule.timesteps_of_block(tf.constant(rows)) == timesteps


# Weights


def test_the_tensors_of_the_loop_can_be_replaced():
    weights = Weights("k", "r", None, {"p": "p", "q": None}, 2.0)
    assert weights._replace(kernel=None).in_loop() == {
        "recurrent_kernel": "r",
        "p": "p",
    }
    assert weights._replace(bias="b").in_loop() == {
        "kernel": "k",
        "recurrent_kernel": "r",
        "bias": "b",
        "p": "p",
    }
    replaced = weights.replaced({"recurrent_kernel": "R", "p": "P"})
    assert replaced == Weights("k", "R", None, {"p": "P", "q": None}, 2.0)
    assert weights.replaced({"bias": "B"}).bias == "B"
    assert weights.dropped(3.0) == 6.0
    assert weights._replace(recurrent_dropout_mask=None).dropped(3.0) == 3.0
