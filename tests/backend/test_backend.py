"""The functions of the seam, those of the backend in use."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import gap

from keras_bnrnn import backend
from keras_bnrnn.backend import missing, tensorflow


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"unroll": True}, {"differentiable": True}, {"ahead": True}],
    ids=str,
)
def test_scan_equals_numpy(options, reverse, rng):
    x, start = rng.normal(size=(5, 3, 2)), rng.normal(size=(3, 2))

    def body(carry, elements):
        (c,), (x_t,) = carry, elements
        return [0.5 * c + x_t], [c * x_t]

    (last,), (stacked,) = backend.scan(
        body,
        [tf.constant(start)],
        [tf.constant(x)],
        [((3, 2), "float64")],
        5,
        reverse=reverse,
        **options,
    )
    carry, expected = start, np.zeros_like(x)
    for t in reversed(range(5)) if reverse else range(5):
        expected[t] = carry * x[t]
        carry = 0.5 * carry + x[t]
    assert gap(last, carry) <= 1e-15
    assert gap(stacked, expected) <= 1e-15


@pytest.mark.parametrize(
    "mode, steps",
    [
        *itertools.product(["graph", "in blocks", "eager"], [0, 1, 3, 4, 5, 8, 11]),
        # In XLA each turn has one timestep, and there is no loop without turns.
        *[("xla", steps) for steps in (1, 5)],
        *[pytest.param("xla", n, marks=pytest.mark.slow) for n in (3, 4, 8, 11)],
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_scan_with_several_timesteps_in_a_turn(mode, known, steps, rng):
    x, start = rng.normal(size=(steps, 3, 2)), rng.normal(size=(3, 2))

    def body(carry, elements):
        (c,), (x_t,) = carry, elements
        return [0.5 * c + x_t], [c * x_t]

    def run(x):
        length = steps if known else tf.shape(x)[0]
        options = (
            {"prepare": lambda x: [2.0 * x], "block": 6} if mode == "in blocks" else {}
        )
        (last,), (stacked,) = backend.scan(
            body,
            [tf.constant(start)],
            [x],
            [((3, 2), "float64")],
            length,
            turn_length=4,
            **options,
        )
        return last, stacked

    if mode != "eager":
        run = tf.function(run, jit_compile=mode == "xla", autograph=False)
    last, stacked = run(tf.constant(x))
    carry, expected = start, np.zeros_like(x)
    for t in range(steps):
        x_t = 2.0 * x[t] if mode == "in blocks" else x[t]
        expected[t], carry = carry * x_t, 0.5 * carry + x_t
    assert gap(last, carry) <= 1e-15
    assert stacked.shape == expected.shape
    assert steps == 0 or gap(stacked, expected) <= 1e-15


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_scan_in_place(mode, reverse, rng):
    """The second stack takes the place of the first sequence, which keeps its values.

    1e-15: a few operations of numbers of order 1 in float64.
    """
    x, y, start = rng.normal(size=(3, 5, 3, 2))

    def body(carry, elements):
        (c,), (x_t, y_t) = carry, elements
        return [0.5 * c + x_t], [c + y_t, c * x_t]

    def run(x, y):
        (last,), stacks = backend.scan(
            body,
            [tf.constant(start[0])],
            [x, y],
            [((3, 2), "float64")] * 2,
            5,
            reverse=reverse,
            in_place=1,
        )
        return last, *stacks, 3 * x

    if mode != "eager":
        run = tf.function(run, jit_compile=mode == "xla", autograph=False)
    found = run(tf.constant(x), tf.constant(y))
    carry, sums, products = start[0], np.zeros_like(x), np.zeros_like(x)
    for t in reversed(range(5)) if reverse else range(5):
        sums[t], products[t] = carry + y[t], carry * x[t]
        carry = 0.5 * carry + x[t]
    for ours, expected in zip(found, (carry, sums, products, 3 * x), strict=True):
        assert gap(ours, expected) <= 1e-15


@pytest.mark.parametrize("length, turn_length", [(5, 1), (5, 2), (6, 2)])
@pytest.mark.parametrize("block", [1, 2, 5, 9])
def test_scan_of_a_sequence_prepared_in_blocks(block, length, turn_length, rng):
    x, y, start = rng.normal(size=(3, length, 3, 2))

    def body(carry, elements):
        (c,), (first_t, second_t, y_t) = carry, elements
        return [0.5 * c + (first_t - second_t[:, :2])], [c * y_t, c]

    def prepare(x):
        return [4 * x, tf.concat([2 * x, x], axis=-1)]

    @tf.function(autograph=False)
    def run(x, y):
        (last,), (stacked, unstacked) = backend.scan(
            body,
            [tf.constant(start[0])],
            [x, y],
            [((3, 2), "float64")] * 2,
            length,
            stacks=1,
            prepare=prepare,
            block=block,
            turn_length=turn_length,
        )
        kept = backend.unstacked(unstacked, ((3, 2), "float64"))
        return last, stacked, backend.between(kept, 1, 4, last)

    last, stacked, between = run(tf.constant(x), tf.constant(y))
    carry, expected, carries = start[0], np.zeros_like(x), np.zeros_like(x)
    for t in range(length):
        expected[t], carries[t] = carry * y[t], carry
        carry = 0.5 * carry + 2 * x[t]
    assert gap(last, carry) <= 1e-15
    assert gap(stacked, expected) <= 1e-15
    assert gap(between, carries[1:4]) <= 1e-15


@pytest.mark.parametrize(
    "mode, length, turn_length",
    [
        *[("graph", *pair) for pair in [(5, 1), (5, 2), (5, 4), (8, 4)]],
        # Elsewhere each turn has one timestep.
        ("eager", 5, 4),
        ("xla", 5, 4),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 5, 9])
def test_scan_blocks_equals_numpy(mode, block, length, turn_length, rng):
    x, start = rng.normal(size=(length, 3, 2)), rng.normal(size=(3, 2))

    def body(carry, elements):
        (c,), (x_t,) = carry, elements
        return [0.5 * c + x_t], [c * x_t, c]

    def of_block(carry, stacks, start, end):
        # The carry of a block is what its last timestep reads.
        from_start = tf.reduce_sum(tf.abs(carry[0] - stacks[1][-1]))
        return [
            tf.reduce_sum(stacks[0] * backend.between(tensor, start, end, carry[0])),
            from_start,
        ]

    def run(x):
        nonlocal tensor, static
        tensor = x
        found = backend.scan_blocks(
            body,
            [tf.constant(start)],
            [x],
            [((3, 2), "float64")] * 2,
            length,
            block,
            [tf.constant(10.0, tf.float64), tf.constant(0.0, tf.float64)],
            of_block,
            (1, 0),
            lambda stacks: tf.concat([3 * stacks[1], stacks[0]], axis=-1),
            4,
            turn_length=turn_length,
        )
        static = found[1].shape
        return found

    tensor = static = None
    if mode != "eager":
        run = tf.function(run, jit_compile=mode == "xla", autograph=False)
    (last,), stacked, (total, from_start) = run(tf.constant(x))
    carry, expected, carries = start, np.zeros_like(x), np.zeros_like(x)
    for t in reversed(range(length)):
        expected[t], carries[t] = carry * x[t], carry
        carry = 0.5 * carry + x[t]
    assert gap(last, carry) <= 1e-15
    assert gap(stacked[..., :2], 3 * expected) <= 1e-14
    assert stacked.shape == (length, 3, 4) and gap(stacked[..., 2:], carries) <= 1e-15
    assert gap(total, 10 + np.sum(expected * x)) <= 1e-13
    assert from_start == 0
    assert static == (length, 3, 4)


@pytest.mark.parametrize("turn_length", [1, 4])
def test_scan_blocks_without_turns(turn_length):
    """A slice without rows runs no turn, and has gradients of T frames of no row."""

    @tf.function(input_signature=[tf.TensorSpec((5, None, 2))], autograph=False)
    def run(x):
        return backend.scan_blocks(
            lambda carry, elements: ([carry[0] + elements[0]], [elements[0]]),
            [x[0]],
            [x],
            [((None, 2), "float32")],
            5,
            2,
            [tf.constant(3.0)],
            lambda carry, stacks, start, end: [tf.reduce_sum(stacks[0]) + 1],
            (0,),
            lambda stacks: 2 * stacks[0],
            2,
            turns=tf.where(tf.shape(x)[1] > 0, 5, 0),
            turn_length=turn_length,
        )

    (last,), results, (total,) = run(tf.zeros((5, 0, 2)))
    assert last.shape == (0, 2) and results.shape == (5, 0, 2) and total == 3.0
    (last,), results, (total,) = run(tf.ones((5, 3, 2)))
    assert gap(results, np.full((5, 3, 2), 2.0)) == 0
    assert gap(last, np.full((3, 2), 6.0)) == 0
    blocks = {1: 3, 4: 2}  # of 2 timesteps, or of one turn of 4
    assert total == 3.0 + 5 * 3 * 2 + blocks[turn_length]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_column_sums_add_in_full_precision(dtype, graph, rng):
    """A sum in half precision stops growing at 256 or 2,048 times its terms."""
    x = tf.cast(rng.uniform(0.5, 1.5, size=(40, 100, 3)), dtype)
    sums = backend.column_sums
    if graph:
        sums = tf.function(sums, autograph=False)
    expected = np.sum(np.asarray(tf.cast(x, "float64")), axis=(0, 1))
    assert sums(x).dtype == dtype
    # The result is rounded once; a float32 sum of 4,000 terms adds some 1e-6.
    digits = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2e-6, "float64": 1e-13}
    np.testing.assert_allclose(
        np.asarray(tf.cast(sums(x), "float64")), expected, rtol=digits[dtype]
    )


def test_scan_can_be_differentiated(rng):
    x = tf.constant(rng.normal(size=(4, 3)))
    with tf.GradientTape() as tape:
        tape.watch(x)
        (last,), _ = backend.scan(
            lambda carry, elements: ([carry[0] * elements[0]], []),
            [tf.ones(3, tf.float64)],
            [x],
            [],
            4,
            differentiable=True,
        )
    product = np.prod(x, axis=0)
    assert gap(tape.gradient(last, x), product / np.asarray(x)) <= 1e-12


def test_custom_gradient_is_right_when_it_is_differentiated(rng):
    """x -> x^3, with a gradient from a kept x^2 that the backend cannot look into."""

    def plain(x):
        return [x * x * x]

    def backward(arguments, kept, upstream):
        return [3.0 * kept[0] * upstream[0]]

    cube = backend.custom_gradient(
        plain, lambda x: (plain(x), [tf.stop_gradient(x * x)]), backward
    )
    x = tf.constant(rng.normal(size=4))
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            (y,) = cube(x)
        first = inner.gradient(y, x)
    assert gap(first, 3.0 * x**2) <= 1e-14
    assert gap(outer.gradient(first, x), 6.0 * x) <= 1e-14


def test_value_and_slope(rng):
    x = tf.constant(rng.normal(size=(3, 2)))
    y, slope = backend.value_and_slope(keras.activations.tanh, x)
    assert gap(y, np.tanh(x)) <= 1e-15
    assert gap(slope, 1 - np.tanh(x) ** 2) <= 1e-15
    _, slope = backend.value_and_slope(tf.ones_like, x)
    assert not np.asarray(slope).any()


def test_products(rng):
    x, y, bias = rng.normal(size=(3, 4)), rng.normal(size=(3, 2)), rng.normal(size=2)
    assert gap(backend.transposed_times(x, y), x.T @ y) <= 1e-14
    assert gap(backend.product_and_bias(x.T, y, bias), x.T @ y + bias) <= 1e-14


@pytest.mark.parametrize("graph", [False, True])
def test_call_if(graph):
    calls = []

    def run(condition):
        backend.call_if(condition, lambda: calls.append(1))
        return tf.constant(0)

    run = tf.function(run, autograph=False) if graph else run
    run(tf.constant(False))
    assert not calls
    run(tf.constant(True))
    assert calls == [1]


def test_compiled_is_traced_once_for_open_axes():
    traces = []

    def function(x):
        traces.append(x.shape)
        return tf.reduce_sum(x)

    run = backend.compiled(function, tf.ones((2, 3, 4)), lambda rank: {0, 1})
    assert [float(run(tf.ones((b, t, 4)))) for b, t in ((2, 3), (5, 1))] == [24.0, 20.0]
    assert [shape.as_list() for shape in traces] == [[None, None, 4]]


def test_another_backend_has_the_same_functions():
    """`missing` stands in for a backend without a time loop."""
    names = [name for name in vars(backend) if hasattr(tensorflow, name)]
    names = [name for name in names if not name.startswith("__")]
    assert {"scan", "FusedKernel", "call_if"} <= set(names)
    for name in names:
        assert hasattr(missing, name), name
    for call in (
        missing.require_time_loop,
        lambda: missing.scan(None, [], [], [], 1),
        lambda: missing.value_and_slope(abs, 1.0),
    ):
        with pytest.raises(NotImplementedError, match="KERAS_BACKEND=tensorflow"):
            call()
    assert missing.replica_count() == 1
    assert missing.custom_gradient(lambda x: [2 * x], None, None)(3) == [6]


def test_functions_of_another_backend(rng):
    """Products equal NumPy's to 1e-14; nothing is traced, sliced, stacked or summed."""
    x, y = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    bias, kernel = rng.normal(size=2), rng.normal(size=(3, 2))
    for found, expected in (
        (missing.transposed_times(x, y), x.T @ y),
        (missing.product_and_bias(x, kernel, bias), x @ kernel + bias),
        (missing.plus_bias(y, bias), y + bias),
        (missing.between(x, 1, 3, None), x[1:3]),
        (missing.unstacked(x, None), x),
        (missing.split(x, [1, 2], -1)[1], x[:, 1:]),
        (missing.sum_over_replicas(x), x),
        (missing.compiled(np.sin, x, None)(x), np.sin(x)),
    ):
        assert gap(found, expected) <= 1e-14
    assert missing.slice_sizes(9, 1) == [9]
    for has_any in (
        missing.is_traced(),
        missing.in_plain_graph(),
        missing.compiled_by_xla(),
        missing.has_fused_kernels(),
        missing.has_block("lstm"),
        missing.graph_of(x),
        missing.call_if(True, lambda: pytest.fail("warnings need TensorFlow")),
        missing.require_positive(0, "unchecked"),
    ):
        assert not has_any
    with pytest.raises(NotImplementedError, match="KERAS_BACKEND=tensorflow"):
        missing.scan_blocks(None, [], [], [], 1, 1, [], None)
    with pytest.raises(NotImplementedError, match="pass `log_dir=None`"):
        missing.write_summaries(missing, {}, {}, 1)
