"""The time loop's own gradient, and statistics from moments.

The gradients themselves are held against the float64 oracle in `test_layers_math.py`.
Here: that every path gives the same as the loop that TensorFlow differentiates, which
it knows nothing of; that derivatives of derivatives are right; and what the paths cost
in programs, not in seconds.
"""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import KINDS, gap, random_mask, randomize

from keras_bnrnn import backend, projection
from keras_bnrnn.recurrence import schedule

B, T, D, U = 6, 7, 3, 4

VARIANTS = {
    "simple_rnn": [{}, {"activation": "relu"}, {"activation": "elu"}],
    "lstm": [
        {},
        {"peephole": True},
        {"activation": "silu", "recurrent_activation": "hard_sigmoid"},
        {"activation": "relu6", "peephole": True},
        {"use_bias": False},
    ],
    "gru": [
        {},
        {"use_bias": False},
        {"activation": "gelu", "recurrent_activation": "hard_sigmoid"},
    ],
}
CASES = [(kind, variant) for kind in VARIANTS for variant in VARIANTS[kind]]
NAMES = [
    "-".join([kind, *(v if isinstance(v, str) else k for k, v in variant.items())])
    for kind, variant in CASES
]
EACH = pytest.mark.parametrize("kind, variant", CASES, ids=NAMES)
BOOLEANS = [False, True]


def make(kind, rng, **arguments):
    layer = KINDS[kind][0](
        U, return_state=True, dtype="float64", **{"momentum": 0.9, **arguments}
    )
    layer.build((B, T, D))
    randomize(layer, rng)
    return layer


def states_of(kind, rng):
    count = 2 if kind == "lstm" else 1
    return [tf.constant(rng.normal(size=(B, U))) for _ in range(count)]


def differentiated_by_tensorflow(monkeypatch):
    """No closed forms: what is left is the plain loop."""
    for own, _ in KINDS.values():
        cell = type(own(1).cell)
        monkeypatch.setattr(cell, "derivative", lambda self: None)


def outputs_and_gradients(layer, x, states, mask, training, seed=3):
    """All outputs, and gradients in x, the states and all trainable weights."""
    weights = [w.value for w in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch([x, *states])
        outputs = layer(x, initial_state=states, mask=mask, training=training)
        loss = 0.0
        for i, output in enumerate(outputs):
            factors = np.random.default_rng(seed + i).normal(size=output.shape)
            loss += tf.reduce_sum(tf.sin(output) * factors)
    gradients = tape.gradient(
        loss, [x, *states, *weights], unconnected_gradients="zero"
    )
    return [*outputs, *gradients]


def results(layer, mode, *arguments):
    """Of a call in a mode; the layer is afterwards as it was before."""
    start = [w.numpy() for w in layer.weights]
    function = outputs_and_gradients
    if mode != "eager":
        function = tf.function(
            function, jit_compile=mode == "xla", autograph=False, reduce_retracing=False
        )
    try:
        return [np.asarray(r) for r in function(layer, *arguments)]
    finally:
        for weight, value in zip(layer.weights, start, strict=True):
            weight.assign(value)


@pytest.mark.slow
@EACH
def test_every_path_agrees_with_the_loop_that_tensorflow_differentiates(
    kind, variant, rng, monkeypatch
):
    """1e-11, of numbers of order 1 to 100 in float64."""
    mask = tf.constant(random_mask(rng, B, T))
    states, x = states_of(kind, rng), tf.constant(rng.normal(size=(B, T, D)))
    cases = []
    for sequences, backwards, m, training in (
        (True, True, mask, True),
        (False, False, mask, True),
        (True, False, None, True),
        (True, False, mask, False),
        (False, True, None, False),
    ):
        layer = make(
            kind, rng, return_sequences=sequences, go_backwards=backwards, **variant
        )
        cases.append((layer, (x, states, m, training)))
    unrolled = make(kind, rng, return_sequences=True, unroll=True, **variant)
    cases.append((unrolled, (x, states, mask, True)))
    assert cases[0][0].cell.derivative() is not None

    def all_results(mode, some):
        return [results(layer, mode, *arguments) for layer, arguments in some]

    some = [cases[0], cases[4]]  # compiling takes seconds each
    own = all_results("graph", cases), all_results("xla", some)
    eager = all_results("eager", some)
    differentiated_by_tensorflow(monkeypatch)
    assert cases[0][0].cell.derivative() is None
    expected = all_results("graph", cases), all_results("graph", some)
    for ours, theirs in zip(
        [*own[0], *own[1], *eager], [*expected[0], *expected[1] * 2], strict=True
    ):
        for a, b in zip(ours, theirs, strict=True):
            assert gap(a, b) <= 1e-11


@pytest.mark.slow(but=["gru-1", "gru-2", "gru-4", "peephole-2", "relu-2", "no mask-2"])
@pytest.mark.parametrize("timesteps", [1, 2, 4])
@pytest.mark.parametrize(
    "kind, variant, masked, in_blocks",
    [
        ("gru", {}, True, True),
        ("gru", {"use_bias": False, "statistics": "frame"}, True, False),
        ("lstm", {"peephole": True}, True, True),
        ("simple_rnn", {"activation": "relu"}, True, False),
        ("simple_rnn", {"activation": "relu", "use_bias": False}, False, True),
    ],
    ids=["gru", "frame", "peephole", "relu", "no mask"],
)
def test_blocks_of_the_loops(
    kind, variant, masked, in_blocks, timesteps, rng, monkeypatch
):
    """Five timesteps in blocks of 1, 2 and 4 give what the eager loop gives.

    1e-11, of numbers of order 1 to 100 in float64. The input is projected in blocks too
    if it is not normalised by frame, and if no step reads the first timestep.
    """
    mask = tf.constant(random_mask(rng, B, T)) if masked else None
    states, x = states_of(kind, rng), tf.constant(rng.normal(size=(B, T, D)))
    layer = make(kind, rng, return_sequences=True, **variant)
    expected = results(layer, "eager", x, states, mask, True)
    monkeypatch.setattr(schedule, "BY_STEP_FROM", 0)
    monkeypatch.setattr(schedule, "BLOCK_FRAMES", timesteps * B)
    projected_in_blocks = []
    scan = backend.scan

    def spied(*arguments, **options):
        projected_in_blocks.append(options["prepare"] is not None)
        return scan(*arguments, **options)

    monkeypatch.setattr(backend, "scan", spied)
    found = results(layer, "graph", x, states, mask, True)
    assert projected_in_blocks == [in_blocks]
    for a, b in zip(found, expected, strict=True):
        assert gap(a, b) <= 1e-11


@pytest.mark.slow(but=["lstm"])
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_dropout_in_the_gradient(kind, rng, monkeypatch):
    """The same mask twice: what is dropped forward is dropped backward."""
    layer = make(kind, rng, return_sequences=True)
    dropped = tf.constant(rng.integers(0, 2, (B, U)) * 2.0)
    layer.cell.recurrent_dropout = 0.5
    monkeypatch.setattr(layer.cell, "get_recurrent_dropout_mask", lambda _: dropped)
    arguments = (
        tf.constant(rng.normal(size=(B, T, D))),
        states_of(kind, rng),
        tf.constant(random_mask(rng, B, T)),
        True,
    )
    ours = results(layer, "graph", *arguments)
    layer.cell.recurrent_dropout = 0.0
    without = results(layer, "eager", *arguments)
    layer.cell.recurrent_dropout = 0.5
    differentiated_by_tensorflow(monkeypatch)
    theirs = results(layer, "eager", *arguments)
    assert max(gap(a, b) for a, b in zip(ours, theirs, strict=True)) <= 1e-12
    assert max(gap(a, b) for a, b in zip(ours, without, strict=True)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_length_may_be_unknown(kind, mode, rng):
    layer = make(kind, rng, return_sequences=True)

    def step(x, mask, *states):
        return outputs_and_gradients(layer, x, list(states), mask, True)

    def step_of(*sizes):
        x = tf.constant(rng.normal(size=(*sizes, D)))
        mask = tf.constant(rng.random(sizes) < 0.6)
        states = [tf.constant(rng.normal(size=(sizes[0], U))) for _ in layer.states]
        return x, mask, *states

    layer.states = [None] * (2 if kind == "lstm" else 1)
    spec = [
        tf.TensorSpec((None, None, D), tf.float64),
        tf.TensorSpec((None, None), tf.bool),
        *[tf.TensorSpec((None, U), tf.float64) for _ in layer.states],
    ]

    def loss(outputs):
        return sum(tf.reduce_sum(tf.sin(o)) for o in outputs)

    def free(x, mask, *states):
        with tf.GradientTape() as tape:
            tape.watch([x, *states])
            value = loss(layer(x, initial_state=list(states), mask=mask, training=True))
        return value, tape.gradient(value, [x, *states])

    compiled = tf.function(
        free, input_signature=spec, jit_compile=mode == "xla", autograph=False
    )
    for sizes in ((2, 3), (7, 1), (4, 9)):
        arguments = step_of(*sizes)
        for a, b in zip(
            tf.nest.flatten(compiled(*arguments)),
            tf.nest.flatten(free(*arguments)),
            strict=True,
        ):
            assert gap(a, b) <= 1e-11


# Derivatives of derivatives


def scalar_of(layer, x, mask=None, training=True):
    outputs = layer(x, mask=mask, training=training)
    return tf.reduce_sum(tf.sin(outputs[0]) * 0.7) + tf.reduce_sum(outputs[-1] ** 2)


def second_derivative(layer, x, mask, training, along):
    """The derivative of `sum(gradient * along)` in x and all weights."""
    weights = [w.value for w in layer.trainable_variables]
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            loss = scalar_of(layer, x, mask, training)
        gradients = inner.gradient(loss, [x, *weights])
        directional = tf.add_n(
            [
                tf.reduce_sum(g * a)
                for g, a in zip(gradients, along, strict=True)
                if g is not None
            ]
        )
    return outer.gradient(directional, [x, *weights], unconnected_gradients="zero")


@pytest.mark.slow(
    but=[
        "simple_rnn-eager-False",
        "simple_rnn-elu-eager-True",
        "simple_rnn-xla-False",
        "lstm-eager-False",
        "lstm-peephole-eager-False",
        "lstm-silu-hard_sigmoid-eager-False",
        "lstm-relu6-peephole-eager-False",
        "lstm-use_bias-eager-False",
        "gru-eager-True",
        "gru-use_bias-eager-False",
        "gru-gelu-hard_sigmoid-eager-False",
    ]
)
@pytest.mark.parametrize("training", BOOLEANS)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@EACH
def test_second_derivatives(kind, variant, mode, training, rng):
    """Against central differences of the first: 1e-6 of numbers of order 1 to 100.

    The step of 1e-5 leaves an error of 1e-10 in the differences of smooth functions;
    inputs keep clear of the corners of the others.
    """
    if mode == "xla" and variant:
        pytest.skip("one variant of each kind is compiled")
    layer = make(kind, rng, return_sequences=True, **variant)
    x = tf.constant(rng.normal(size=(B, T, D)))
    mask = tf.constant(random_mask(rng, B, T))
    start = [w.numpy() for w in layer.weights]
    variables = [w.value for w in layer.trainable_variables]
    along = [tf.constant(rng.normal(size=v.shape)) for v in [x, *variables]]

    def function(x):
        return second_derivative(layer, x, mask, training, along)

    if mode != "eager":
        function = tf.function(function, jit_compile=mode == "xla", autograph=False)

    def reset():
        for weight, value in zip(layer.weights, start, strict=True):
            weight.assign(value)

    second = [np.asarray(s) for s in function(x)]

    def first_along(shift):
        """The gradient where x and the weights are moved along the direction."""
        reset()
        for v, a in zip(variables, along[1:], strict=True):
            v.assign_add(shift * a)
        at = x + shift * along[0]
        with tf.GradientTape() as tape:
            tape.watch(at)
            loss = scalar_of(layer, at, mask, training)
        gradients = tape.gradient(loss, [at, *variables], unconnected_gradients="zero")
        return [np.asarray(g) for g in gradients]

    epsilon = 1e-5
    ahead, behind = first_along(epsilon), first_along(-epsilon)
    reset()
    for s, a, b in zip(second, ahead, behind, strict=True):
        expected = (a - b) / (2 * epsilon)
        assert gap(s, expected) <= 1e-6 * max(1.0, np.max(np.abs(expected)))


@pytest.mark.slow(but=["gru-False"])
@pytest.mark.parametrize("pfor", BOOLEANS)
@pytest.mark.parametrize("kind", KINDS)
def test_jacobians(kind, pfor, rng):
    """Row by row the gradient of one output, whichever way TensorFlow takes."""
    layer = make(kind, rng)
    x = tf.constant(rng.normal(size=(B, T, D)))

    @tf.function(autograph=False)
    def jacobian(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)[0]
        return tape.jacobian(y, x, experimental_use_pfor=pfor)

    whole = np.asarray(jacobian(x))  # (B, U, B, T, D)
    for b, u in ((0, 1), (2, 3)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)[0][b, u]
        assert gap(whole[b, u], tape.gradient(y, x)) <= 1e-12
    assert np.max(np.abs(whole)) > 1e-3


def test_forward_mode(rng):
    layer = make("lstm", rng)
    x = tf.constant(rng.normal(size=(B, T, D)))
    along = tf.constant(rng.normal(size=(B, T, D)))
    with tf.autodiff.ForwardAccumulator(x, along) as accumulator:
        forward = accumulator.jvp(layer(x)[0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)[0]
    expected = np.einsum("bucde,cde->bu", tape.jacobian(y, x), along)
    assert gap(forward, expected) <= 1e-12


# Which loop is taken


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("simple_rnn", {"activation": "softmax"}),
        ("lstm", {"activation": lambda x: x / 2}),
        ("lstm", {"recurrent_activation": "softmax"}),
        ("gru", {"reset_after": False}),
        ("gru", {"activation": "log_softmax"}),
    ],
)
def test_what_has_no_closed_form_is_left_to_tensorflow(kind, arguments, rng):
    """An activation across units has no slope: finite differences tell."""
    layer = make(kind, rng, return_sequences=True, **arguments)
    assert layer.cell.derivative() is None
    x = rng.normal(size=(B, T, D))
    along = rng.normal(size=x.shape)

    def value(shift):
        return float(scalar_of(layer, tf.constant(x + shift * along), None, False))

    at = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(at)
        loss = scalar_of(layer, at, None, False)
    slope = np.sum(np.asarray(tape.gradient(loss, at)) * along)
    expected = (value(1e-5) - value(-1e-5)) / 2e-5
    assert abs(slope - expected) <= 1e-6 * max(1.0, abs(expected))


# Statistics from moments


def force(monkeypatch, by_moments):
    monkeypatch.setattr(projection, "moments_are_cheaper", lambda *_: by_moments)


def inputs(name, rng):
    x = rng.normal(size=(32, 20, D))
    if name == "far":  # mean 1e3, deviation 1
        x += 1e3
    elif name == "rank deficient":
        x[..., 1] = 2.0 * x[..., 0]
        x[..., 2] = 0.5
    elif name == "constant":
        x[:] = 1.5
    return x


@pytest.mark.slow(
    but=[
        "simple_rnn-usual-False-float32",
        "simple_rnn-usual-True-float64",
        "lstm-far-False-float32",
        "lstm-far-True-float64",
        "gru-rank deficient-False-float64",
        "gru-constant-True-float32",
    ]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("masked", BOOLEANS)
@pytest.mark.parametrize("name", ["usual", "far", "rank deficient", "constant"])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_agree_with_the_projection_s_own(
    kind, name, masked, dtype, rng, monkeypatch
):
    """Outputs, statistics and gradients: 1e-5 in float32, 1e-10 in float64."""
    own, _ = KINDS[kind]
    layer = own(U, return_sequences=True, dtype=dtype)
    x = inputs(name, rng)
    layer.build(x.shape)
    randomize(layer, rng)
    x = tf.constant(x.astype(dtype))
    mask = tf.constant(rng.random(x.shape[:2]) < 0.7) if masked else None
    start = [w.numpy() for w in layer.weights]
    weights = [w.value for w in layer.trainable_variables]
    factors = rng.normal(size=(*x.shape[:2], U)).astype(dtype)

    found = []
    for by_moments in BOOLEANS:
        force(monkeypatch, by_moments)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, mask=mask, training=True)
            # A mean: sums over hundreds of frames would carry as many roundings.
            loss = tf.reduce_mean(tf.sin(y) * factors)
        gradients = tape.gradient(loss, [x, *weights])
        moved = [w.numpy() for w in layer.non_trainable_weights]
        found.append([np.asarray(r) for r in [y, *gradients, *moved]])
        for weight, value in zip(layer.weights, start, strict=True):
            weight.assign(value)
    bound = 1e-5 if dtype == "float32" else 1e-10
    for a, b in zip(*found, strict=True):
        assert np.all(np.isfinite(a)) and np.all(np.isfinite(b))
        assert gap(a, b) <= bound * max(1.0, np.max(np.abs(a)))
    if name == "usual":
        assert gap(found[0][0], found[1][0]) > 0  # there were two ways


@pytest.mark.parametrize("by_moments", BOOLEANS)
def test_float32_holds_far_from_zero(by_moments, rng, monkeypatch):
    """Mean 1e3, deviation 1: float32 against float64, 1e-4 of outputs of order 1.

    The input itself carries 6e-5 of its deviation in rounding, in both.
    """
    force(monkeypatch, by_moments)
    x = inputs("far", rng).astype("float32")
    outputs = []
    for dtype in ("float32", "float64"):
        layer = KINDS["lstm"][0](U, return_sequences=True, dtype=dtype)
        layer.build(x.shape)
        randomize(layer, np.random.default_rng(5))
        outputs.append(layer(x.astype(dtype), training=True))
        norm = layer.input_norm
        frames = x.astype("float64").reshape(-1, D)
        a = frames @ np.asarray(layer.cell.kernel, "float64")
        # update_count is 7: the batch weighs 1 / 8 of the statistics.
        before = KINDS["lstm"][0](U, dtype="float64")
        before.build(x.shape)
        randomize(before, np.random.default_rng(5))
        old = before.input_norm
        for value, was, new in (
            (norm.moving_mean, old.moving_mean, a.mean(0)),
            (norm.moving_variance, old.moving_variance, a.var(0)),
        ):
            expected = np.asarray(was) * 7 / 8 + new / 8
            # 1e-6 of the mean, 1e3: a few roundings.
            assert gap(value, expected) <= 1e-3
    assert gap(*outputs) <= 1e-4


def test_the_rule(rng):
    cheaper = projection.moments_are_cheaper
    assert cheaper((100, 32, 128), 512)
    assert cheaper((None, None, 250), 1000)
    # Wide inputs, few frames: the covariance would cost more than it saves.
    assert not cheaper((35, 20, 650), 2600)
    assert not cheaper((None, None, 4096), 1024)
    assert not cheaper((100, 1, 128), 512)


def test_wide_inputs_have_no_covariance(rng):
    """In the program of a training step: no (D, D) product."""
    width = 61

    def program(units):
        layer = keras_layer(units)
        x = tf.constant(rng.normal(size=(4, 10, width)).astype("float32"))
        layer(x)

        @tf.function(jit_compile=True, autograph=False)
        def step(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(layer(x, training=True))
            return tape.gradient(loss, [w.value for w in layer.trainable_variables])

        return step.experimental_get_compiler_ir(x)(stage="hlo")

    def keras_layer(units):
        return KINDS["lstm"][0](units, return_sequences=True)

    assert f"[{width},{width}]" not in program(3)
    assert f"[{width},{width}]" in program(64)


@pytest.mark.slow(but=["lstm"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_xla_copies_no_sequence(kind, rng):
    """The values of a step, then its gradient, take the place of the projection.

    A copy of the sequence in each turn would take most of the time of a step.
    """
    batch, timesteps, units = 5, 6, 3
    layer = KINDS[kind][0](units, return_sequences=True)
    x = tf.constant(rng.normal(size=(batch, timesteps, 4)).astype("float32"))
    layer(x)

    @tf.function(jit_compile=True, autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(layer(x, training=True) ** 2)
        return tape.gradient(loss, [w.value for w in layer.trainable_variables])

    program = step.experimental_get_compiler_ir(x)(stage="optimized_hlo")
    width = layer.cell.kernel.shape[-1]
    projections = re.findall(
        rf" = f32\[{timesteps},{batch},{width}\]\S* (\w+)", program
    )
    assert projections and "copy" not in projections


@pytest.mark.slow(but=["simple_rnn-True", "lstm-False"])
@pytest.mark.parametrize("jit_compile", BOOLEANS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_in_half_precision_follows_float32(kind, jit_compile, rng):
    """bfloat16 has 8 bits: rounding of each step adds up to some 5e-2."""
    outputs, statistics = [], []
    x = rng.normal(size=(16, 10, D)).astype("float32")
    for policy in ("float32", "mixed_bfloat16"):
        layer = KINDS[kind][0](U, return_sequences=True, dtype=policy)
        layer.build(x.shape)
        randomize(layer, np.random.default_rng(5))

        def step(layer=layer):
            with tf.GradientTape() as tape:
                y = layer(x, training=True)
                loss = tf.reduce_mean(tf.cast(y, "float32") ** 2)
            weights = [w.value for w in layer.trainable_variables]
            return y, tape.gradient(loss, weights)

        if jit_compile:
            step = tf.function(step, jit_compile=True, autograph=False)
        y, gradients = step()
        assert all(np.all(np.isfinite(g)) for g in gradients)
        outputs.append(np.asarray(keras.ops.cast(y, "float32")))
        statistics.append(np.asarray(layer.input_norm.moving_variance))
    assert gap(*outputs) <= 5e-2
    assert gap(*statistics) <= 1e-2


@pytest.mark.slow(but=["simple_rnn-eager", "lstm-graph", "gru-graph"])
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_half_precision_are_those_of_float32(kind, mode, rng):
    """A bias has the sum of 3,200 terms, which bfloat16 cannot add one by one."""
    x = rng.normal(size=(32, 100, D)).astype("float32")
    gradients = []
    for policy in ("float32", "mixed_float16", "mixed_bfloat16"):
        layer = KINDS[kind][0](U, return_sequences=True, dtype=policy)
        layer.build(x.shape)
        randomize(layer, np.random.default_rng(5))

        def step(x, layer=layer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.cast(layer(x, training=True), "float32"))
            return tape.gradient(loss, [w.value for w in layer.trainable_variables])

        if mode != "eager":
            step = tf.function(step, jit_compile=mode == "xla", autograph=False)
        gradients.append([np.asarray(g, "float64") for g in step(tf.constant(x))])
    for half, bits in zip(gradients[1:], (11, 8), strict=True):
        for found, expected in zip(half, gradients[0], strict=True):
            # Each of 100 timesteps rounds states and gates.
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert error <= 10 * 2.0**-bits


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_bfloat16_sums_over_many_blocks(kind, rng, monkeypatch):
    """A sum in bfloat16 stops growing at 256 times its terms: here 500 blocks."""
    monkeypatch.setattr(schedule, "BY_STEP_FROM", 0)
    monkeypatch.setattr(schedule, "BLOCK_FRAMES", 16)
    x = rng.normal(size=(4, 2000, D)).astype("float32") + 1.0
    weights = None
    gradients = []
    for policy in ("float32", "mixed_bfloat16"):
        layer = KINDS[kind][0](U, return_sequences=True, use_bias=False, dtype=policy)
        layer.build(x.shape)
        layer.set_weights(weights or layer.get_weights())
        weights = layer.get_weights()

        @tf.function(autograph=False)
        def step(x, layer=layer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.cast(layer(x, training=True), "float32"))
            of = [layer.cell.kernel.value, layer.cell.recurrent_kernel.value]
            return tape.gradient(loss, of)

        gradients.append([np.asarray(g, "float64") for g in step(tf.constant(x))])
    for expected, found in zip(*gradients, strict=True):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error <= 10 * 2.0**-8


@pytest.mark.slow(but=["lstm-graph", "gru-eager", "gru-xla"])
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_gradient_from_above(kind, mode, rng):
    """That of `gather`, of each output; a dense one of the same is the oracle."""
    layer = make(kind, rng)
    x = tf.constant(rng.normal(size=(B, T, D)))
    layer(x)
    rows = [2, 0, 2]
    picks = tf.one_hot(rows, B, dtype=tf.float64)

    def gradients(pick, mode):
        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                outputs = [pick(y) for y in layer(x, training=True)]
                loss = tf.add_n([tf.reduce_sum(tf.sin(y)) for y in outputs])
            return tape.gradient(loss, [x, *[w.value for w in layer.trainable_weights]])

        if mode == "eager":
            return step(x)
        return tf.function(step, jit_compile=mode == "xla", autograph=False)(x)

    sparse = gradients(lambda y: tf.gather(y, rows), mode)
    dense = gradients(lambda y: tf.matmul(picks, y), "eager")
    for a, b in zip(sparse, dense, strict=True):
        assert gap(a, b) <= 1e-12


def test_second_derivatives_leave_the_forward_loop_alone(rng):
    """No gradient, not even of zeros, goes back through what the loop kept.

    In a graph the derivative is that of eager mode: 1e-11 of numbers of order 1 to 100.
    """
    layer = make("simple_rnn", rng, return_sequences=True)
    x = tf.constant(rng.normal(size=(B, T, D)))
    layer(x)

    def penalty(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.reduce_sum(layer(x, training=True)[0] ** 2)
            squares = tf.reduce_sum(inner.gradient(y, x) ** 2)
        return outer.gradient(squares, x)

    in_graph = tf.function(penalty, autograph=False).get_concrete_function(x)
    nodes = in_graph.graph.as_graph_def().node
    loops = [n for n in nodes if n.op in ("While", "StatelessWhile")]
    # Forward, backward; then the plain loop, its gradient, and the two of that.
    assert len(loops) <= 6
    assert gap(in_graph(x), penalty(x)) <= 1e-11
