"""The mathematics of the layers: against a float64 oracle, stock layers and NumPy.

Losses are sums weighed by random numbers, so that no two gradients are alike by chance.
"""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import oracle
import pytest
import tensorflow as tf
from helpers import KINDS, gap, oracle_weights, random_mask, randomize

import keras_bnrnn
from keras_bnrnn import SequenceBatchNorm

B, T, D, U = 5, 6, 4, 3
EPSILON = 1e-3
GATES = {"simple_rnn": 1, "lstm": 4, "gru": 3}
CELL_CLASSES = {
    "simple_rnn": keras_bnrnn.BNSimpleRNNCell,
    "lstm": keras_bnrnn.BNLSTMCell,
    "gru": keras_bnrnn.BNGRUCell,
}

each_kind = pytest.mark.parametrize("kind", list(KINDS))
each_cell = pytest.mark.parametrize(
    "kind, arguments",
    [
        pytest.param("simple_rnn", {}, id="simple_rnn"),
        pytest.param("lstm", {}, id="lstm"),
        pytest.param("lstm", {"peephole": True}, id="lstm-peephole"),
        pytest.param("gru", {"reset_after": True}, id="gru-reset_after"),
        pytest.param("gru", {"reset_after": False}, id="gru-reset_before"),
    ],
)
each_stock_cell = pytest.mark.parametrize(
    "kind, arguments",
    [
        pytest.param("simple_rnn", {}, id="simple_rnn"),
        pytest.param("lstm", {}, id="lstm"),
        pytest.param("gru", {"reset_after": True}, id="gru-reset_after"),
        pytest.param("gru", {"reset_after": False}, id="gru-reset_before"),
    ],
)
each_normalize = pytest.mark.parametrize("normalize", ["input", "joint"])
each_statistics = pytest.mark.parametrize("statistics", ["sequence", "frame"])
each_normalization = pytest.mark.parametrize(
    "normalization",
    [
        pytest.param({"normalize": "input", "statistics": "sequence"}, id="sequence"),
        pytest.param({"normalize": "input", "statistics": "frame"}, id="frame"),
        pytest.param({"normalize": "joint"}, id="joint"),
    ],
)

# Of `@each_cell` with one of the last two: each value at least once.
some_normalizations = pytest.mark.slow(
    but=[
        "sequence-simple_rnn",
        "sequence-gru-reset_after",
        "sequence-gru-reset_before",
        "frame-lstm",
        "joint-lstm-peephole",
    ]
)
some_normalize = pytest.mark.slow(
    but=[
        "input-simple_rnn",
        "input-lstm-peephole",
        "input-gru-reset_after",
        "input-gru-reset_before",
        "joint-lstm",
    ]
)


@pytest.fixture(params=[("float32", 1e-5), ("float64", 1e-12)], ids=lambda p: p[0])
def tolerance(request):
    """Keras in either precision, and how far 6 steps may be off in it."""
    dtype, allowed = request.param
    if dtype == "float64":
        request.getfixturevalue("float64")
    return allowed


# 1. Inference


@pytest.mark.slow(
    but=[
        "float32-state-input-simple_rnn",
        "float32-state-joint-gru-reset_before",
        "float32-mask-state-backwards-zeros-input-lstm-peephole",
        "float64-state-joint-gru-reset_after",
        "float64-mask-state-backwards-zeros-joint-lstm",
    ]
)
@each_cell
@each_normalize
@pytest.mark.parametrize(
    "masked, with_state, options",
    [
        pytest.param(False, True, {}, id="state"),
        pytest.param(
            True,
            True,
            {"go_backwards": True, "zero_output_for_mask": True},
            id="mask-state-backwards-zeros",
        ),
    ],
)
def test_inference_equals_the_oracle_and_a_folded_stock_layer(
    kind, arguments, normalize, masked, with_state, options, tolerance, rng
):
    layer = bn_layer(kind, rng, **arguments, **options, normalize=normalize)
    x = normal(rng, B, T, D)
    mask = random_mask(rng, B, T) if masked else None
    initial_state = random_state(kind, rng) if with_state else None

    outputs, *states = layer(x, mask=mask, initial_state=initial_state)

    expected, final = oracle.rnn_inference(
        kind,
        x,
        mask,
        oracle_weights(layer),
        initial_state=initial_state,
        **oracle_options(layer),
    )
    assert_close([outputs, *states], [expected, *final], tolerance)
    if "peephole" not in arguments:
        stock = stock_layer(kind, **arguments, **options)
        stock.set_weights(folded_by_hand(layer))
        folded = stock(x, mask=mask, initial_state=initial_state)
        assert_close([outputs, *states], folded, tolerance)


def folded_by_hand(layer):
    """Weights of the stock layer that this one is at inference: the formula."""
    w = oracle_weights(layer)
    scale = w["gamma"] / np.sqrt(w["moving_variance"] + EPSILON)
    bias = w["beta"] - w["moving_mean"] * scale
    of_recurrent = scale if layer.normalize == "joint" else 1.0
    if "recurrent_bias" in w:
        bias = np.stack([bias, w["recurrent_bias"] * of_recurrent])
    return [w["kernel"] * scale, w["recurrent_kernel"] * of_recurrent, bias]


# 2. Identity


@pytest.mark.slow(
    but=[
        "backwards-input-simple_rnn",
        "stateful-joint-lstm",
        "last-zeros-input-gru-reset_after",
        "unroll-input-gru-reset_before",
    ]
)
@each_stock_cell
@each_normalize
@pytest.mark.parametrize(
    "options",
    [
        {"go_backwards": True},
        {"stateful": True},
        {"return_sequences": False, "zero_output_for_mask": True},
        {"unroll": True},
    ],
    ids=["backwards", "stateful", "last-zeros", "unroll"],
)
def test_identity_statistics_give_the_stock_layer(
    kind, arguments, normalize, options, rng
):
    layer = bn_layer(kind, rng, **arguments, **options, normalize=normalize)
    stock = stock_layer(kind, **arguments, **options)
    randomize(stock, rng)
    copy_stock_weights(stock, layer)

    stateful = options.get("stateful", False)
    # With `stateful`, the second call goes on from where the first ended.
    for masked in (True, False):
        x = normal(rng, B, T, D)
        mask = random_mask(rng, B, T) if masked else None
        state = None if stateful else random_state(kind, rng)
        # Float32 rounding over 6 steps.
        assert_close(
            layer(x, mask=mask, initial_state=state),
            stock(x, mask=mask, initial_state=state),
            1e-6,
        )


def copy_stock_weights(stock, layer):
    kernel, recurrent_kernel, bias = stock.get_weights()
    cell, norm = layer.cell, layer.cell.input_norm
    cell.kernel.assign(kernel)
    cell.recurrent_kernel.assign(recurrent_kernel)
    if bias.ndim == 2:
        bias, recurrent_bias = bias
        cell.recurrent_bias.assign(recurrent_bias)
    norm.beta.assign(bias)
    norm.gamma.assign(np.ones_like(bias))
    norm.moving_mean.assign(np.zeros_like(bias))
    norm.moving_variance.assign(np.full_like(bias, 1.0 - EPSILON))


# 3. Training


@pytest.mark.slow(
    but=[
        "ragged-False-sequence-simple_rnn",
        "ragged-False-frame-gru-reset_after",
        "ragged-False-joint-lstm-peephole",
        "random-True-sequence-gru-reset_before",
        "random-True-frame-lstm",
    ]
)
@each_cell
@each_normalization
@pytest.mark.parametrize("pattern, go_backwards", [("ragged", False), ("random", True)])
def test_training_equals_autodiff_of_the_oracle(
    kind, arguments, normalization, pattern, go_backwards, rng, float64
):
    layer = bn_layer(kind, rng, **arguments, **normalization, go_backwards=go_backwards)
    layer.input_norm.update_count.assign(0.0)
    x, mask = normal(rng, B, T, D), make_mask(pattern, rng)
    initial_state, upstream = random_state(kind, rng), random_upstream(rng)

    results, gradients = differentiate(
        layer, x, mask, upstream, initial_state, training=True
    )

    weights = {k: tf.constant(w) for k, w in oracle_weights(layer).items()}
    x, initial_state = tf.constant(x), [tf.constant(s) for s in initial_state]
    with tf.GradientTape() as tape:
        tape.watch([x, weights, initial_state])
        outputs, states, info = oracle.rnn_training(
            kind,
            x,
            mask,
            weights,
            layer.input_norm.statistics,
            initial_state=initial_state,
            **oracle_options(layer),
        )
        loss = weighed_sum([outputs, *states], upstream)
    of_x, of_weights, of_state = tape.gradient(loss, [x, weights, initial_state])

    assert_close(results, [outputs, *states], 1e-10)  # float64, 6 steps
    of_weights["peephole_kernel"] = of_weights.pop("peephole", None)
    expected = {"x": of_x, **dict(zip("hc", of_state, strict=False)), **of_weights}
    assert set(gradients) == {k for k, v in expected.items() if v is not None}
    for name, gradient in gradients.items():
        # Float64 rounding over 6 steps, and division by small standard deviations.
        assert relative_gap(gradient, expected[name]) <= 1e-8, name
    norm = layer.input_norm  # the first update copies the batch
    assert gap(norm.moving_mean, info["mean"]) <= 1e-12
    assert gap(norm.moving_variance, info["variance"]) <= 1e-12
    assert float(norm.update_count) == 1


@some_normalizations
@each_cell
@each_normalization
def test_gradient_of_what_is_normalised_sums_to_zero_over_each_group(
    kind, arguments, normalization, rng, float64
):
    width = GATES[kind] * U
    layer = bn_layer(kind, rng, features=width, **arguments, **normalization)
    layer.cell.kernel.assign(np.eye(width))  # dL/dx is then dL/dz
    x, mask = normal(rng, B, T, width), random_mask(rng, B, T)

    _, gradients = differentiate(layer, x, mask, random_upstream(rng), training=True)

    gradient = gradients["x"]
    groups = [mask]
    if normalization.get("statistics") != "sequence":
        order = (
            np.cumsum(mask[:, ::-1], 1)[:, ::-1]
            if layer.go_backwards
            else (np.cumsum(mask, 1))
        )
        groups = [mask & (order == k) for k in range(1, T + 1)]
    assert np.abs(gradient).max() > 1e-2
    for group in groups:
        total = gradient[group].sum(axis=0)
        assert np.abs(total).max() <= 1e-13 * np.abs(gradient).sum()  # float64 rounding


# 4. Masked frames


@some_normalizations
@each_cell
@each_normalization
def test_masked_frames_are_not_there_in_training(kind, arguments, normalization, rng):
    layer = bn_layer(kind, rng, **arguments, **normalization)
    check_that_masked_frames_are_not_there(layer, rng, training=True)


@pytest.mark.slow(but=["lstm"])
@each_kind
def test_masked_frames_are_not_there_backwards(kind, rng):
    layer = bn_layer(kind, rng, go_backwards=True)
    check_that_masked_frames_are_not_there(layer, rng, training=True)


@some_normalize
@each_cell
@each_normalize
def test_masked_frames_are_not_there_at_inference(kind, arguments, normalize, rng):
    layer = bn_layer(kind, rng, **arguments, normalize=normalize)
    check_that_masked_frames_are_not_there(layer, rng, training=False)


def check_that_masked_frames_are_not_there(layer, rng, training):
    weights = layer.get_weights()
    x, mask = normal(rng, B, T, D), random_mask(rng, B, T)
    upstream = random_upstream(rng)

    @tf.function
    def run(x, mask, of_outputs):
        return differentiate(
            layer, x, mask, [of_outputs, *upstream[1:]], training=training
        )

    shapes = [(B, None, D), (B, None), (B, None, U)]
    dtypes = [tf.float32, tf.bool, tf.float32]
    run = run.get_concrete_function(*map(tf.TensorSpec, shapes, dtypes))
    expected, gradients = in_numpy(run(*tensors(x, mask, upstream[0])))
    statistics = layer.input_norm.get_weights()
    for frames, content in ((1, np.nan), (7, 1e4), (50, 1e4), (50, np.nan)):
        layer.set_weights(weights)
        after = ((0, 0), (0, frames), (0, 0))
        processed = ((0, 0), (frames, 0), (0, 0)) if layer.go_backwards else after
        results, longer_gradients = in_numpy(
            run(
                *tensors(
                    np.pad(x, after, constant_values=content),
                    np.pad(mask, after[:2]),
                    np.pad(upstream[0], processed),
                )
            )
        )

        outputs = results[0][:, frames:] if layer.go_backwards else results[0][:, :T]
        # Float32: longer sums are rounded differently.
        assert_close([outputs, *results[1:]], expected, 1e-6)
        of_x = longer_gradients.pop("x")
        assert np.all(of_x[:, T:] == 0)
        assert np.all(of_x[:, :T][~mask] == 0)
        for name, gradient in {"x": of_x[:, :T], **longer_gradients}.items():
            assert relative_gap(gradient, gradients[name]) <= 1e-6, name
        assert_close(layer.input_norm.get_weights(), statistics, 1e-6)


# 5. Nothing to take statistics of


@some_normalizations
@each_cell
@each_normalization
def test_fully_masked_batch_is_finite_and_teaches_nothing(
    kind, arguments, normalization, rng
):
    layer = bn_layer(kind, rng, **arguments, **normalization)
    weights = layer.get_weights()
    x, mask = np.full((B, T, D), np.nan, "float32"), np.zeros((B, T), bool)

    results, gradients = differentiate(
        layer, x, mask, random_upstream(rng), random_state(kind, rng), training=True
    )

    assert_finite(results, gradients)
    assert np.all(results[0] == 0) and np.all(gradients["x"] == 0)
    for before, now in zip(weights, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(before, now)


@some_normalizations
@each_cell
@each_normalization
def test_steps_with_no_valid_row_and_with_one_are_finite(
    kind, arguments, normalization, rng
):
    layer = bn_layer(kind, rng, **arguments, **normalization)
    x, mask = normal(rng, B, T, D), np.ones((B, T), bool)
    mask[:, 2], mask[1:, 4], mask[:, T - 1] = False, False, False
    x[~mask] = np.nan

    results, gradients = differentiate(
        layer, x, mask, random_upstream(rng), training=True
    )

    assert_finite(results, gradients)
    assert np.all(gradients["x"][~mask] == 0)
    assert all(np.isfinite(w).all() for w in layer.get_weights())


# 6. Moving averages


@pytest.mark.slow(but=["0.5-sequence-simple_rnn", "0.5-frame-gru", "0.99-frame-lstm"])
@each_kind
@each_statistics
@pytest.mark.parametrize("momentum", [0.5, 0.99])
def test_kth_update_weighs_its_batch_by_1_minus_momentum_or_1_over_k(
    kind, statistics, momentum, rng, float64
):
    layer = bn_layer(kind, rng, statistics=statistics, momentum=momentum)
    norm, kernel = layer.input_norm, layer.cell.kernel.numpy()
    norm.update_count.assign(0.0)
    step = tf.function(lambda x, mask: layer(x, mask=mask, training=True))
    batches = []
    for k in range(1, 11):
        x, mask = normal(rng, B, T, D, mean=k), random_mask(rng, B, T)
        batches.append(oracle.pooled_moments(x @ kernel, mask))
        step(x, mask)
        expected = oracle.moving_average(batches, momentum)
        # Float64: relative to moments of about 10.
        assert_close([norm.moving_mean, norm.moving_variance], expected, 1e-12)
        assert float(norm.update_count) == k
        if k == 1:
            assert_close(expected, batches[0], 0.0)


@pytest.mark.slow(
    but=["inference-simple_rnn-joint", "layer-lstm-input", "input_norm-gru-joint"]
)
@pytest.mark.parametrize(
    "kind, normalize", [("simple_rnn", "joint"), ("lstm", "input"), ("gru", "joint")]
)
@pytest.mark.parametrize("still", ["inference", "layer", "input_norm"])
def test_inference_and_frozen_layers_change_nothing(kind, normalize, still, rng):
    layer = bn_layer(kind, rng, normalize=normalize)
    x, mask = normal(rng, B, T, D), random_mask(rng, B, T)
    expected = layer(x, mask=mask, training=False)
    if still == "layer":
        layer.trainable = False
    elif still == "input_norm":
        layer.cell.input_norm.trainable = False
    training = still != "inference"
    before = [v.numpy() for v in layer.variables]

    call = tf.function(lambda x: layer(x, mask=mask, training=training))
    for _ in range(100):
        results = call(x)

    assert_close(results, expected, 1e-6)  # the graph may fuse what eager does not
    for value, v in zip(before, layer.variables, strict=True):
        np.testing.assert_array_equal(value, v.numpy())


@each_kind
def test_only_the_frozen_normalisation_lets_the_kernels_learn(kind, rng, float64):
    layer = bn_layer(kind, rng)
    layer.cell.input_norm.trainable = False
    x, mask, upstream = (
        normal(rng, B, T, D),
        random_mask(rng, B, T),
        random_upstream(rng),
    )
    _, frozen = differentiate(layer, x, mask, upstream, training=True)
    layer.cell.input_norm.trainable = True
    _, inference = differentiate(layer, x, mask, upstream, training=False)

    assert set(inference) - set(frozen) == {"gamma", "beta"}
    for name, gradient in frozen.items():
        assert relative_gap(gradient, inference[name]) <= 1e-12, name


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("earlier_steps", [0, 3])
def test_training_moves_on_from_set_statistics(momentum, earlier_steps, rng, float64):
    norm = SequenceBatchNorm(momentum=momentum)
    norm.build((B, T, D))
    for _ in range(earlier_steps):
        norm(normal(rng, B, T, D), training=True)
    mean, variance = rng.normal(size=D), rng.uniform(1.0, 2.0, size=D)
    norm.set_statistics(mean, variance)
    assert_close([norm.moving_mean, norm.moving_variance], [mean, variance], 0.0)

    x = normal(rng, B, T, D, mean=5.0)
    norm(x, training=True)

    expected = [
        momentum * old + (1.0 - momentum) * new
        for old, new in zip(
            (mean, variance), oracle.pooled_moments(x, None), strict=True
        )
    ]
    assert_close([norm.moving_mean, norm.moving_variance], expected, 1e-12)


# 7. A mean far from zero


@pytest.mark.slow(but=["False-(64, 50, 3)-sequence", "True-(200, 1000, 2)-frame"])
@each_statistics
@pytest.mark.parametrize("shape", [(64, 50, 3), (200, 1000, 2)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_variance_far_from_zero(statistics, shape, masked, rng):
    x = normal(rng, *shape, mean=1e3)
    mask = rng.random(shape[:2]) < 0.7 if masked else None
    norm = SequenceBatchNorm(statistics=statistics)
    y = np.asarray(norm(x, mask=mask, training=True))

    mean, variance = oracle.pooled_moments(x, mask)
    assert gap(norm.moving_variance, variance) < 1e-3
    assert gap(norm.moving_mean, mean) <= 2e-3  # float32: 2e-6 of 1e3
    frames = y[mask] if masked else y
    assert abs(frames.var(dtype="float64") - 1 / (1 + EPSILON)) < 1e-3 + 0.03 * (
        statistics == "frame"
    )


@pytest.mark.slow(but=["sequence-simple_rnn", "frame-lstm", "joint-gru"])
@each_kind
@each_normalization
def test_variance_far_from_zero_in_a_layer(kind, normalization, rng):
    layer = far_from_zero(
        bn_layer(kind, rng, features=GATES[kind] * U, **normalization)
    )
    x, mask = normal(rng, 64, 20, GATES[kind] * U, mean=1e3), rng.random((64, 20)) < 0.7
    layer(x, mask=mask, training=True)
    _, variance = oracle.pooled_moments(x, mask)
    assert gap(layer.input_norm.moving_variance, variance) < 1e-3


@pytest.mark.slow(but=["input-simple_rnn", "input-gru", "joint-lstm"])
@each_kind
@each_normalize
def test_variance_far_from_zero_in_a_cell(kind, normalize, rng):
    width = GATES[kind] * U
    layer = keras.layers.RNN(CELL_CLASSES[kind](U, normalize=normalize))
    layer.build((64, 20, width))
    far_from_zero(layer)
    x = normal(rng, 64, 20, width, mean=1e3)
    layer(x, training=True)
    _, variance = oracle.pooled_moments(x, None)
    assert gap(layer.cell.input_norm.moving_variance, variance) < 1e-3


def far_from_zero(layer):
    """Makes inputs the pre-activations, and the next update the first."""
    cell = layer.cell
    cell.kernel.assign(np.eye(cell.kernel.shape[0]))
    cell.recurrent_kernel.assign(np.zeros(cell.recurrent_kernel.shape))
    if getattr(cell, "recurrent_bias", None) is not None:
        cell.recurrent_bias.assign(np.zeros(cell.recurrent_bias.shape))
    cell.input_norm.update_count.assign(0.0)
    return layer


# 8. SequenceBatchNorm alone


@pytest.mark.slow(
    but=[
        "float32-{}-(5, 6, 4)-sequence",
        "float32-{'scale': False}-(5, 6, 4)-frame",
        "float64-{'center': False}-(5, 6, 2, 4)-frame",
    ]
)
@each_statistics
@pytest.mark.parametrize("shape", [(B, T, D), (B, T, 2, D)], ids=str)
@pytest.mark.parametrize("affine", [{}, {"center": False}, {"scale": False}], ids=str)
def test_normalisation_equals_numpy(statistics, shape, affine, tolerance, rng):
    norm = SequenceBatchNorm(statistics=statistics, **affine)
    norm.build(shape)
    randomize(norm, rng)
    norm.update_count.assign(0.0)
    gamma = 1.0 if norm.gamma is None else norm.gamma.numpy()
    beta = 0.0 if norm.beta is None else norm.beta.numpy()
    x, upstream = normal(rng, *shape), normal(rng, *shape)
    mask = random_mask(rng, B, T)
    upstream[~mask] = 0.0
    y, dx, dgamma, dbeta = by_group(statistics, x, mask, upstream, gamma, beta)
    x[~mask] = np.nan

    results, gradients = differentiate(norm, x, mask, [upstream], training=True)

    assert gap(results[0][mask], y[mask]) <= tolerance
    assert np.isfinite(results[0]).all()
    assert np.all(gradients["x"][~mask] == 0)
    expected = {"x": dx, "gamma": dgamma, "beta": dbeta}
    for name, gradient in gradients.items():
        assert relative_gap(gradient, expected[name]) <= 10 * tolerance, name
    frames = x[mask].reshape(1, -1, D)
    moments = oracle.pooled_moments(frames, None)
    assert_close([norm.moving_mean, norm.moving_variance], moments, tolerance)


def by_group(statistics, x, mask, upstream, gamma, beta):
    """Outputs and gradients of batch normalisation in NumPy, group by group."""
    x, upstream = np.float64(x), np.float64(upstream)
    y, dx, dgamma, dbeta = np.zeros_like(x), np.zeros_like(x), 0.0, 0.0
    groups = [mask]
    if statistics == "frame":
        groups = [mask & (np.cumsum(mask, 1) == k) for k in range(1, T + 1)]
    for group in groups:
        a, g = x[group].reshape(-1, D), upstream[group].reshape(-1, D)
        if not len(a):
            continue
        scale = 1.0 / np.sqrt(a.var(axis=0) + EPSILON)
        n = (a - a.mean(axis=0)) * scale
        d = gamma * scale * (g - g.mean(axis=0) - n * (g * n).mean(axis=0))
        y[group] = (gamma * n + beta).reshape(y[group].shape)
        dx[group] = d.reshape(dx[group].shape)
        dgamma, dbeta = dgamma + (g * n).sum(axis=0), dbeta + g.sum(axis=0)
    return y, dx, dgamma, dbeta


def test_normalisation_at_inference_equals_numpy(tolerance, rng):
    norm = SequenceBatchNorm()
    norm.build((B, T, D))
    randomize(norm, rng)
    weights = [w.numpy().astype("float64") for w in norm.weights]
    gamma, beta, mean, variance, _ = weights
    x, upstream, mask = (
        normal(rng, B, T, D),
        normal(rng, B, T, D),
        random_mask(rng, B, T),
    )
    upstream[~mask] = 0.0
    normalized = (np.float64(x) - mean) / np.sqrt(variance + EPSILON)
    dgamma = (upstream * normalized)[mask].sum(axis=0)
    x[~mask] = np.nan

    (y,), gradients = differentiate(norm, x, mask, [upstream], training=False)

    assert gap(y[mask], (gamma * normalized + beta)[mask]) <= tolerance
    assert np.all(gradients["x"][~mask] == 0)
    assert relative_gap(gradients["gamma"], dgamma) <= 10 * tolerance
    for before, w in zip(weights, norm.weights, strict=True):
        np.testing.assert_array_equal(before, w.numpy())


@each_statistics
def test_normalisation_in_mixed_precision(statistics, rng):
    norm = SequenceBatchNorm(statistics=statistics, dtype="mixed_float16")
    norm.build((B, T, D))
    randomize(norm, rng)
    norm.update_count.assign(0.0)
    x, mask = normal(rng, B, T, D, mean=100.0).astype("float16"), random_mask(rng, B, T)
    y = norm(x, mask=mask, training=True)

    expected, *_ = by_group(
        statistics, x, mask, np.zeros_like(x), norm.gamma.numpy(), norm.beta.numpy()
    )
    assert y.dtype == "float16"
    assert {w.dtype for w in norm.weights} == {"float32"}
    assert gap(y.numpy()[mask], expected[mask]) <= 4e-3  # half a float16 step below 8
    moments = oracle.pooled_moments(x, mask)
    # Computed in float32, of values around 100.
    assert_close([norm.moving_mean, norm.moving_variance], moments, 1e-4)


# 9. Mixed precision


@pytest.mark.slow(
    but=[
        "True-sequence-simple_rnn",
        "True-frame-gru-reset_after",
        "True-joint-lstm-peephole",
        "False-sequence-gru-reset_before",
        "False-frame-lstm",
    ]
)
@each_cell
@each_normalization
@pytest.mark.parametrize("training", [True, False])
def test_mixed_precision_is_close_to_float32(
    kind, arguments, normalization, training, rng
):
    full = bn_layer(kind, rng, **arguments, **normalization)
    half = bn_layer(kind, rng, **arguments, **normalization, dtype="mixed_float16")
    half.set_weights(full.get_weights())
    x, mask = normal(rng, B, T, D), np.ones((B, T), bool)
    mask[3:, 4:] = False

    expected = full(x, mask=mask, training=training)
    results, gradients = differentiate(
        half, x, mask, random_upstream(rng), training=training
    )

    assert {w.dtype for w in half.weights} == {"float32"}
    assert {r.dtype.name for r in results} == {"float16"}
    assert_finite(results, gradients)
    # Float16 keeps 3 digits; normalising few rows magnifies, 6 steps add up.
    assert_close(results, expected, 2e-2)
    # The products are rounded to float16, the statistics of them are not.
    assert_close(half.input_norm.get_weights(), full.input_norm.get_weights(), 5e-3)


# 10. Cells


@some_normalize
@each_cell
@each_normalize
def test_cell_in_rnn_infers_like_the_layer(kind, arguments, normalize, rng):
    layer = bn_layer(kind, rng, **arguments, normalize=normalize)
    rnn = rnn_of(bn_cell(kind, **arguments, normalize=normalize))
    rnn.set_weights(layer.get_weights())
    x, mask, state = (
        normal(rng, B, T, D),
        random_mask(rng, B, T),
        random_state(kind, rng),
    )
    # Float32: the cell normalises after the product, the layer before it.
    assert_close(
        rnn(x, mask=mask, initial_state=state),
        layer(x, mask=mask, initial_state=state),
        1e-5,
    )


@each_kind
@each_normalize
def test_stacked_cells_infer_like_stacked_layers(kind, normalize, rng):
    lower = bn_layer(kind, rng, normalize=normalize, return_state=False)
    upper = bn_layer(kind, rng, features=U, normalize=normalize, return_state=False)
    cells = [bn_cell(kind, normalize=normalize) for _ in range(2)]
    rnn = rnn_of(keras.layers.StackedRNNCells(cells), return_state=False)
    for cell, layer in zip(cells, (lower, upper), strict=True):
        copy_weights(layer.cell, cell)
    x = normal(rng, B, T, D)
    assert gap(rnn(x), upper(lower(x))) <= 1e-5  # float32, as above


@some_normalize
@each_cell
@each_normalize
def test_cell_in_rnn_trains_on_each_timestep(kind, arguments, normalize, rng, float64):
    rnn = rnn_of(bn_cell(kind, **arguments, normalize=normalize))
    randomize(rnn, rng)
    rnn.cell.input_norm.update_count.assign(0.0)
    x, upstream = normal(rng, B, T, D), random_upstream(rng)

    results, gradients = differentiate(rnn, x, None, upstream, training=True)

    weights = {k: tf.constant(w) for k, w in oracle_weights(rnn).items()}
    with tf.GradientTape() as tape:
        tape.watch(weights)
        outputs, states, info = oracle.rnn_training(
            kind,
            x,
            None,
            weights,
            "frame",
            normalize=normalize,
            reset_after=arguments.get("reset_after", True),
        )
        loss = weighed_sum([outputs, *states], upstream)
    of_weights = tape.gradient(loss, weights)
    assert_close(results, [outputs, *states], 1e-10)
    for name in ("kernel", "recurrent_kernel", "gamma", "beta"):
        assert relative_gap(gradients[name], of_weights[name]) <= 1e-8, name
    # 6 updates of weight 1/k are one average over all steps.
    norm = rnn.cell.input_norm
    moments = [info["mean"], info["variance"]]
    assert_close([norm.moving_mean, norm.moving_variance], moments, 1e-12)


@pytest.mark.slow(but=["False-True-simple_rnn", "True-False-gru", "False-False-lstm"])
@each_kind
@pytest.mark.parametrize("in_graph", [True, False])
@pytest.mark.parametrize("unroll", [True, False])
def test_stacked_cells_train_on_each_timestep(kind, in_graph, unroll, rng, float64):
    cells = [bn_cell(kind), bn_cell(kind)]
    stack = keras.layers.StackedRNNCells(cells)
    rnn = rnn_of(stack, return_state=False, unroll=unroll)
    outputs = x = normal(rng, B, T, D)
    rnn.build(x.shape)
    randomize(rnn, rng)
    for cell in cells:
        cell.input_norm.update_count.assign(0.0)
    train = tf.function(rnn) if in_graph else rnn
    results = train(tf.constant(x), training=True)
    for cell in cells:
        weights = oracle_weights(keras.layers.RNN(cell))
        outputs, _, info = oracle.rnn_training(kind, outputs, None, weights, "frame")
        # Keras tries the first timestep before its loop; it counts once all the same.
        norm = cell.input_norm
        assert float(norm.update_count) == T
        moments = [info["mean"], info["variance"]]
        assert_close([norm.moving_mean, norm.moving_variance], moments, 1e-12)
    assert gap(results, outputs) <= 1e-10  # float64, 6 steps of 2 cells


@pytest.mark.parametrize("in_graph", [True, False])
def test_a_stateful_rnn_of_a_cell_trains(in_graph, rng, float64):
    rnn = rnn_of(bn_cell("gru"), stateful=True, return_state=False)
    x = normal(rng, B, 2 * T, D)
    rnn.build((B, T, D))
    randomize(rnn, rng)
    rnn.reset_state()
    rnn.cell.input_norm.update_count.assign(0.0)
    train = tf.function(rnn) if in_graph else rnn
    halves = [train(tf.constant(h), training=True) for h in np.split(x, 2, axis=1)]
    outputs, _, info = oracle.rnn_training("gru", x, None, oracle_weights(rnn), "frame")
    assert gap(np.concatenate(halves, axis=1), outputs) <= 1e-10  # float64, 12 steps
    norm = rnn.cell.input_norm
    assert float(norm.update_count) == 2 * T
    moments = [info["mean"], info["variance"]]
    assert_close([norm.moving_mean, norm.moving_variance], moments, 1e-12)


# 11. Replicas


@pytest.mark.slow
def test_synchronized_replicas_equal_one():
    """In a process of its own: devices are split before TensorFlow starts."""
    here = pathlib.Path(__file__)
    done = subprocess.run(
        [sys.executable, "-c", f"import {here.stem} as m; m.compare_replicas()"],
        cwd=here.parent,
        env={**os.environ, "PYTHONPATH": str(here.parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compare_replicas():
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    for kind in KINDS:
        compare_on_replicas(strategy, kind, "sequence", length_on_first=2)
    compare_on_replicas(strategy, "lstm", "frame", length_on_first=2)
    for statistics in ("sequence", "frame"):
        compare_on_replicas(strategy, "simple_rnn", statistics, length_on_first=0)
    for normalize in ("input", "joint"):
        compare_populations(strategy, normalize)
    compare_nonfinite(strategy)
    with strategy.scope():
        rnn = keras.layers.RNN(bn_cell("lstm"))
        rnn.build((B, T, D))
    x = tf.zeros((B, T, D))
    with pytest.raises(ValueError, match=r"BNLSTMCell 'bnlstm_cell.*2 replicas"):
        strategy.run(lambda: rnn(x, training=True))


def compare_dropout(strategy):
    """Replicas draw masks of their own, for batches of their own size."""
    with strategy.scope():
        layer = KINDS["lstm"][0](U, dropout=0.5, recurrent_dropout=0.5)
        layer.build((None, T, D))
    x = tf.constant(np.random.default_rng(0).normal(size=(B, T, D)), "float32")
    for sizes in ((B, B), (B, B - 2)):
        batches = strategy.experimental_distribute_values_from_function(
            lambda context, sizes=sizes: x[: sizes[context.replica_id_in_sync_group]]
        )

        @tf.function
        def step(batches):
            return strategy.run(lambda x: layer(x, training=True), [batches])

        first, second = strategy.experimental_local_results(step(batches))
        assert (len(first), len(second)) == sizes
        assert gap(first[: B - 2], second[: B - 2]) > 1e-3


def compare_nonfinite(strategy):
    """A replica whose batch is not finite is left out; so is all of a shared one."""
    rng = np.random.default_rng(20151005)
    x = normal(rng, 2, B, T, D)
    x[0, 1, 2, 0] = np.nan
    for synchronized in (False, True):
        with strategy.scope():
            norm = SequenceBatchNorm(synchronized=synchronized)
            norm.build((None, T, D))

        @tf.function
        def step(norm=norm):
            def call():
                replica = tf.distribute.get_replica_context().replica_id_in_sync_group
                norm(tf.gather(tf.constant(x), replica), training=True)

            strategy.run(call)

        step()
        mean, variance, count = (
            keras.ops.convert_to_numpy(v)
            for v in (norm.moving_mean, norm.moving_variance, norm.update_count)
        )
        if synchronized:
            assert count == 0 and np.all(mean == 0.0)
        else:
            assert count == 1
            assert gap(mean, x[1].mean((0, 1))) <= 1e-6
            assert gap(variance, x[1].var((0, 1))) <= 1e-5
        assert norm.nonfinite_batches == 1


def compare_populations(strategy, normalize):
    """Replicas that normalise by themselves still learn one population.

    Each step of one timestep: then the pre-activations do not depend on statistics.
    The first replica has no valid frame in the first step.
    """
    rng = np.random.default_rng(20151005)
    x = normal(rng, 2, 2 * B, 1, D)
    mask = np.ones((2, 2 * B, 1), bool)
    mask[0, :B] = False

    def make_layer():
        layer = KINDS["gru"][0](U, normalize=normalize)
        layer.build((None, 1, D))
        randomize(layer, np.random.default_rng(1))
        layer.input_norm.update_count.assign(0.0)
        # The candidate's pre-activation has r in it, which statistics do move.
        layer.cell.recurrent_bias.assign(np.zeros(3 * U))
        return layer

    alone = make_layer()
    with strategy.scope():
        layer = make_layer()
    for one_x, one_mask in zip(x, mask, strict=True):
        alone(one_x, mask=one_mask, training=True)
        halves = (
            strategy.experimental_distribute_values_from_function(
                lambda context, a=a: tf.constant(
                    np.split(a, 2)[context.replica_id_in_sync_group]
                )
            )
            for a in (one_x, one_mask)
        )
        strategy.run(
            tf.function(lambda a, m: layer(a, mask=m, training=True)), tuple(halves)
        )
    # Float32, sums in another order.
    assert_close(layer.input_norm.get_weights(), alone.input_norm.get_weights(), 1e-6)
    assert gap(layer.input_norm.update_count, 2.0) == 0


def compare_on_replicas(strategy, kind, statistics, length_on_first):
    """Compares both replicas with one that is given both halves of the batch.

    The first replica's sequences all have the length `length_on_first`; the second's
    vary.
    """
    rng = np.random.default_rng(20151005)
    x, upstream = normal(rng, 2 * B, T, D), normal(rng, 2 * B, T, U)
    lengths = rng.integers(1, T + 1, size=2 * B)
    lengths[:B] = length_on_first
    mask = np.arange(T) < lengths[:, None]
    x[~mask] = np.nan
    batch = (x, mask, upstream)

    def split(a):
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                np.split(a, 2)[context.replica_id_in_sync_group]
            )
        )

    def synchronized_layer():
        layer = KINDS[kind][0](
            U, return_sequences=True, statistics=statistics, synchronized=True
        )
        layer.build((None, T, D))
        randomize(layer, np.random.default_rng(1))
        layer.input_norm.update_count.assign(0.0)
        return layer

    def step(layer, x, mask, upstream):
        variables = [v.value for v in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, mask=mask, training=True)
            loss = tf.reduce_sum(y * upstream)
        of_x, *of_variables = tape.gradient(loss, [x, *variables])
        return y, of_x, of_variables

    alone = synchronized_layer()
    y, of_x, of_variables = step(alone, *map(tf.constant, batch))
    with strategy.scope():
        layer = synchronized_layer()
    distributed = tf.function(
        lambda *args: strategy.run(lambda *mine: step(layer, *mine), args)
    )
    replica_y, replica_of_x, replica_of_variables = distributed(*map(split, batch))

    def joined(value):
        return np.concatenate(strategy.experimental_local_results(value))

    # Float32, sums in another order.
    assert gap(joined(replica_y), y) <= 1e-6
    assert relative_gap(joined(replica_of_x), of_x) <= 1e-6
    for ours, expected in zip(replica_of_variables, of_variables, strict=True):
        total = sum(strategy.experimental_local_results(ours))
        assert relative_gap(total, expected) <= 1e-6
    assert_close(layer.input_norm.get_weights(), alone.input_norm.get_weights(), 1e-6)
    assert gap(layer.input_norm.update_count, 1.0) == 0


# Shared


def normal(rng, *shape, mean=0.0):
    return rng.normal(mean, 1.0, shape).astype(keras.config.floatx())


def random_state(kind, rng):
    return [normal(rng, B, U) for _ in range(2 if kind == "lstm" else 1)]


def random_upstream(rng):
    """What a loss weighs outputs and final states by."""
    return [normal(rng, B, T, U), normal(rng, B, U), normal(rng, B, U)]


def make_mask(pattern, rng):
    if pattern == "none":
        return None
    if pattern == "random":
        return random_mask(rng, B, T)
    return np.arange(T) < np.array([T, 1, 3, 5, 4])[:, None]


def bn_layer(kind, rng, features=D, **arguments):
    arguments = {"return_sequences": True, "return_state": True, **arguments}
    layer = KINDS[kind][0](U, **arguments)
    layer.build((B, T, features))
    randomize(layer, rng)
    return layer


def stock_layer(kind, **arguments):
    arguments = {"return_sequences": True, "return_state": True, **arguments}
    layer = KINDS[kind][1](U, **arguments)
    layer.build((B, T, D))
    return layer


def bn_cell(kind, **arguments):
    return CELL_CLASSES[kind](U, **arguments)


def rnn_of(cell, **arguments):
    arguments = {"return_sequences": True, "return_state": True, **arguments}
    rnn = keras.layers.RNN(cell, **arguments)
    rnn.build((B, T, D))
    return rnn


def copy_weights(source, target):
    for a, b in zip(source.weights, target.weights, strict=True):
        assert a.name == b.name
        b.assign(a)


def oracle_options(layer):
    return {
        "normalize": layer.normalize,
        "reset_after": getattr(layer, "reset_after", True),
        "go_backwards": layer.go_backwards,
        "zero_output_for_mask": layer.zero_output_for_mask,
    }


def weighed_sum(results, upstream):
    return sum(
        tf.reduce_sum(tf.cast(r, u.dtype) * u)
        for r, u in zip(results, upstream, strict=False)
    )


def differentiate(layer, x, mask, upstream, initial_state=None, training=None):
    """Outputs and states, and the gradients of their weighed sum by name."""
    x, call = tf.convert_to_tensor(x), {"mask": mask, "training": training}
    sources = {"x": x}
    if initial_state is not None:
        initial_state = [tf.constant(s) for s in initial_state]
        sources |= dict(zip("hc", initial_state, strict=False))
        call["initial_state"] = initial_state
    with tf.GradientTape() as tape:
        tape.watch(sources)
        results = keras.tree.flatten(layer(x, **call))
        loss = weighed_sum(results, upstream)
    sources |= {v.name: v.value for v in layer.trainable_variables}
    gradients = tape.gradient(loss, sources)
    if tf.executing_eagerly():
        return in_numpy((results, gradients))
    return results, gradients


def tensors(*arrays):
    return [tf.constant(a) for a in arrays]


def in_numpy(tree):
    return keras.tree.map_structure(lambda tensor: tensor.numpy(), tree)


def relative_gap(a, b):
    """The largest difference, relative to the largest value of b."""
    return gap(a, b) / np.abs(b).max()


def assert_close(results, expected, allowed):
    results, expected = keras.tree.flatten(results), keras.tree.flatten(expected)
    for a, b in zip(results, expected, strict=True):
        assert gap(a, b) <= allowed


def assert_finite(results, gradients):
    for value in [*results, *gradients.values()]:
        assert np.isfinite(value).all()
