"""Collinear features, and weights that take their difference.

Features `a` and `a + d`, with `a` of standard deviation `level` and `d` of 1, and
kernel columns that sum to 0: the variance of the projection is about 1, and the terms
that it is the sum of are of the size of `level ** 2`. The oracle is float64 NumPy with
the gradient of batch normalisation in closed form.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bnrnn import BNSimpleRNN, SequenceBatchNorm, projection

EPSILON = 1e-3
KERNEL = np.array([[1.0, -1.0, 0.5, 0.3], [-1.0, 1.0, -0.5, 0.8]])
# Float32 itself loses 6e-3 at a level of 10,000: its inputs are off by 1e-7 of that.
OUTPUTS_WITHIN = {1: 1e-5, 30: 1e-3, 100: 1e-3, 1_000: 1e-3, 10_000: 1e-2}


def collinear(level):
    generator = np.random.default_rng(level)
    a = generator.normal(0.0, level, (32, 50, 1))
    d = generator.normal(0.0, 1.0, (32, 50, 1))
    return np.concatenate([a, a + d], axis=-1).astype("float32")


def oracle(x, kernel, gamma, upstream, valid, axes):
    """Variance, outputs and the gradients of inputs, kernel and gamma."""
    x, kernel = x.astype("float64"), kernel.astype("float64")
    weight = valid[..., None].astype("float64")
    count = weight.sum(axis=axes, keepdims=True)

    def mean(values):
        return (values * weight).sum(axis=axes, keepdims=True) / count

    p = x @ kernel
    centred = p - mean(p)
    variance = mean(centred**2)
    deviation = np.sqrt(variance + EPSILON)
    normalized = centred / deviation
    d_normalized = upstream * gamma * weight
    d_p = (d_normalized - mean(d_normalized)) / deviation
    d_p = (d_p - normalized * mean(d_normalized * normalized) / deviation) * weight
    centred_x = (x - mean(x)) * weight
    of_folded = np.einsum("btd,btf->df", centred_x, upstream * weight)
    return {
        "variance": variance,
        "outputs": gamma * normalized * weight,
        "inputs": d_p @ kernel.T,
        "kernel": np.einsum("btd,btf->df", x, d_p),
        "gamma": (upstream * normalized * weight).sum((0, 1)),
        "terms of gamma": np.sum(np.abs(of_folded * kernel), axis=0) / deviation[0, 0],
    }


def linear_layer(statistics="sequence"):
    """A layer whose outputs are its normalised projection."""
    layer = BNSimpleRNN(
        4,
        activation="linear",
        recurrent_initializer="zeros",
        use_bias=False,
        statistics=statistics,
        return_sequences=True,
        zero_output_for_mask=True,
        epsilon=EPSILON,
    )
    layer.build((None, None, 2))
    layer.cell.kernel.assign(KERNEL)
    layer.cell.input_norm.gamma.assign([0.5, 1.5, 2.0, 0.7])
    return layer


def relative(value, expected):
    return np.max(np.abs(value - expected)) / np.max(np.abs(expected))


@pytest.mark.slow(but=["moments-eager", "projection-graph", "frame-xla"])
@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
@pytest.mark.parametrize("path", ["moments", "projection", "frame"])
def test_layer(path, how, monkeypatch):
    monkeypatch.setattr(projection, "moments_are_cheaper", lambda *_: path == "moments")
    layer = linear_layer("frame" if path == "frame" else "sequence")
    norm = layer.cell.input_norm
    generator = np.random.default_rng(7)
    upstream = generator.normal(size=(32, 50, 4)).astype("float32")
    mask = None if how == "eager" else generator.random((32, 50)) < 0.6
    if mask is not None and path == "frame":  # t is then the column
        mask = np.arange(50) < generator.integers(25, 51, (32, 1))
    valid = np.ones((32, 50), bool) if mask is None else mask
    axes = (0,) if path == "frame" else (0, 1)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, mask=mask, training=True)
        sources = [x, layer.cell.kernel.value, norm.gamma.value]
        return outputs, tape.gradient(outputs, sources, output_gradients=upstream)

    if how != "eager":
        step = tf.function(step, jit_compile=how == "xla")
    for level, within in OUTPUTS_WITHIN.items():
        x = collinear(level)
        norm.update_count.assign(0)  # the next update copies the batch
        outputs, gradients = step(tf.constant(x))
        expected = oracle(x, KERNEL, norm.gamma.numpy(), upstream, valid, axes)
        assert relative(outputs.numpy(), expected["outputs"]) < within, level
        if path != "frame":
            variance = expected["variance"][0, 0]
            assert np.max(np.abs(norm.moving_variance / variance - 1)) < 1e-3, level
        names = ("inputs", "kernel", "gamma")
        for name, gradient in zip(names, gradients, strict=True):
            bound = within
            if path == "moments" and name == "gamma":
                # It is the sum of these terms, one for each feature, and a term is a
                # float32 sum of 1,600 products. How they are summed, and so the error,
                # depends on the processor.
                error = np.sqrt(1600) * 2**-24 * np.max(expected["terms of gamma"])
                bound = max(within, error / np.max(np.abs(expected["gamma"])))
            assert relative(gradient.numpy(), expected[name]) < bound, (level, name)


@pytest.mark.slow(but=["1-eager", "30-graph", "100-eager", "1000-eager", "10000-eager"])
@pytest.mark.parametrize("how", ["eager", "graph"])
@pytest.mark.parametrize("level", OUTPUTS_WITHIN)
def test_what_a_fused_kernel_is_given(level, how):
    norm = SequenceBatchNorm(epsilon=EPSILON, center=False)
    norm.build((None, None, 4))
    norm.gamma.assign([0.5, 1.5, 2.0, 0.7])
    x, kernel = tf.constant(collinear(level)), tf.constant(KERNEL, "float32")
    upstream = np.random.default_rng(7).normal(size=(32, 50, 4)).astype("float32")

    def step(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            frames, folded, bias = projection.folded_projection(norm, x, kernel)
            assert bias is None
            outputs = keras.ops.matmul(frames, folded)
        return outputs, tape.gradient(outputs, [x, kernel], output_gradients=upstream)

    outputs, gradients = (tf.function(step) if how == "graph" else step)(x, kernel)
    valid = np.ones((32, 50), bool)
    expected = oracle(x.numpy(), KERNEL, norm.gamma.numpy(), upstream, valid, (0, 1))
    within = OUTPUTS_WITHIN[level]
    assert relative(outputs, expected["outputs"]) < within
    variance = expected["variance"][0, 0]
    assert np.max(np.abs(norm.moving_variance / variance - 1)) < 1e-3
    for name, gradient in zip(("inputs", "kernel"), gradients, strict=True):
        assert relative(gradient.numpy(), expected[name]) < within, name


def test_independent_features_keep_to_the_moments():
    """The guard costs no projection where nothing cancels."""
    generator = np.random.default_rng(0)
    for width in (2, 20, 250):
        x = generator.normal(size=(1000, width)).astype("float32")
        w = generator.normal(size=(width, 40)).astype("float32")
        centred = x - x.mean(axis=0)
        variance, _, cancels = projection.variance_by_covariance(
            tf.constant(centred), tf.constant(w), tf.constant([[1000.0]])
        )
        assert not cancels
        expected = (centred.astype("float64") @ w).var(axis=0)
        np.testing.assert_allclose(variance[0], expected, rtol=1e-5)
