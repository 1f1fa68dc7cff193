"""Masked moments, pooling and normalising, against NumPy in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import gap

from keras_bnrnn import statistics as stats

VALID = [None, "rows", "elements"]


def valid_of(name, rng):
    """A mask that broadcasts to (4, 5, 3); no group is empty, some have one element."""
    if name is None:
        return None
    valid = rng.random((4, 5, 1 if name == "rows" else 3)) < 0.6
    valid[-1], valid[:, -1], valid[-1, -1] = False, False, True
    valid[0], valid[:, 0] = True, True
    return valid


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("name", VALID)
def test_moments_equal_numpy(name, axes, rng):
    """1e-13, of numbers of order 1 to 10 in float64. Invalid elements are NaN."""
    x, valid = rng.normal(2.0, 1.5, (4, 5, 3)), valid_of(name, rng)
    counted = np.ones((4, 5, 1)) if valid is None else valid
    mask = np.broadcast_to(counted, x.shape).astype(bool)
    x = np.where(mask, x, np.nan)
    expected = np.nanmean(x, axis=axes, keepdims=True)
    deviations = np.where(mask, x - expected, 0.0)
    counts = np.sum(counted, axis=axes, keepdims=True)

    x = tf.constant(x)
    mean, centred, count = stats.centre(x, valid, axes)
    for found, wanted in (
        (mean, expected),
        (centred, deviations),
        (count, counts),
        (stats.masked_moments(x, valid, axes)[0], expected),
        (stats.masked_moments(x, valid, axes)[1], np.nanvar(x, axes, keepdims=True)),
        (stats.masked_moments(x, valid, axes)[2], counts),
    ):
        assert found.shape == wanted.shape
        assert gap(found, wanted) <= 1e-13


def test_moments_of_the_first_axis_by_default(rng):
    x = tf.constant(rng.normal(size=(4, 3)))
    for function in (stats.centre, stats.masked_moments):
        for a, b in zip(function(x), function(x, None, (0,)), strict=True):
            assert a.shape == b.shape and gap(a, b) == 0.0
    assert stats.masked_moments(x)[1].shape == (1, 3)


def test_a_single_element_and_none(rng):
    """The moments of one element are the element and 0; of none, 0 and 0."""
    x = tf.constant(rng.normal(5.0, 1.0, (2, 3)))
    for valid, expected in (([[True], [False]], x[:1]), ([[False], [False]], 0.0 * x)):
        mean, variance, count = stats.masked_moments(x, np.array(valid))
        assert gap(mean, expected[:1]) == 0.0 and gap(variance, 0.0) == 0.0
        assert gap(count, np.sum(valid)) == 0.0


def test_gradients_of_moments(rng):
    """Against the derivatives in closed form: `1 / n` and `2 (x - mean) / n`."""
    x, valid = rng.normal(2.0, 1.5, (6, 3)), np.array([1, 0, 1, 1, 0, 1], bool)[:, None]
    x = np.where(valid, x, np.nan)
    weights = rng.normal(size=3), rng.normal(size=3)
    x_tensor = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x_tensor)
        mean, variance, _ = stats.masked_moments(x_tensor, valid)
        loss = tf.reduce_sum(mean * weights[0] + variance * weights[1])
    deviations = np.where(valid, x - np.nanmean(x, 0), 0.0)
    expected = (valid * weights[0] + 2.0 * deviations * weights[1]) / 4
    assert gap(tape.gradient(loss, x_tensor), expected) <= 1e-14


def test_moments_are_summed_over_replicas(rng):
    """Each sum is that of two replicas with the same elements, of which half count."""
    x = tf.constant(rng.normal(2.0, 1.5, (4, 3)))
    sums = []

    def twice(total):
        sums.append(total)
        return 2.0 * total

    mean, variance, count = stats.masked_moments(x, None, (0,), twice)
    assert len(sums) == 4  # the count, the mean twice, the squares
    assert gap(count, 8.0) == 0.0
    assert gap(mean, np.mean(x, 0)) <= 1e-14
    assert gap(variance, np.var(x, 0)) <= 1e-14


def test_pooled_moments_are_those_of_the_union(rng):
    """1e-13, of numbers of order 1 to 10 in float64."""
    groups = [rng.normal(3.0 * i, 1.0 + i, (n, 3)) for i, n in enumerate((1, 4, 2))]
    means = np.stack([g.mean(0) for g in groups] + [np.full(3, 7.0)])
    variances = np.stack([g.var(0) for g in groups] + [np.full(3, 9.0)])
    counts = np.array([[1.0], [4.0], [2.0], [0.0]])  # the last group is empty
    mean, variance, count = stats.pool(*map(tf.constant, (means, variances, counts)))
    union = np.concatenate(groups)
    assert (mean.shape, variance.shape, count.shape) == ((3,), (3,), (1,))
    assert gap(mean, union.mean(0)) <= 1e-13
    assert gap(variance, union.var(0)) <= 1e-13
    assert gap(count, 7.0) == 0.0


def test_pooling_a_single_element_and_none():
    means, variances = tf.constant([[3.0, 4.0]]), tf.constant([[0.0, 0.0]])
    mean, variance, count = stats.pool(means, variances, tf.constant([[1.0]]))
    assert gap(mean, [3.0, 4.0]) == gap(variance, 0.0) == gap(count, 1.0) == 0.0
    mean, variance, count = stats.pool(means, variances, tf.constant([[0.0]]))
    assert gap(mean, 0.0) == gap(variance, 0.0) == gap(count, 0.0) == 0.0


def test_the_pooled_mean_far_from_zero(rng):
    """One rounding of float32 at 1e4: 5e-4. A single pass of 3,000 sums has 3e-3."""
    means = rng.normal(1e4, 1.0, (3000, 4)).astype("float32")
    counts = rng.integers(1, 50, (3000, 1)).astype("float32")
    mean, _, _ = stats.pool(*map(tf.constant, (means, 0.0 * means, counts)))
    weights = counts.astype("float64") / counts.sum()
    assert gap(mean, np.sum(weights * means, axis=0)) <= 6e-4


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_scale_and_shift_equal_numpy(scaled, centred, rng):
    """1e-13, of numbers of order 1 to 10 in float64."""
    x, mean = rng.normal(2.0, 3.0, (5, 3)), rng.normal(2.0, 1.0, 3)
    variance = rng.uniform(0.5, 3.0, 3)
    gamma = rng.uniform(0.5, 1.5, 3) if scaled else None
    beta = rng.normal(size=3) if centred else None
    expected = (x - mean) / np.sqrt(variance + 0.1)
    expected = expected * (gamma if scaled else 1.0) + (beta if centred else 0.0)
    arguments = [
        None if a is None else tf.constant(a) for a in (mean, variance, gamma, beta)
    ]
    scale, shift = stats.scale_and_shift(*arguments, 0.1)
    assert gap(keras.ops.convert_to_numpy(scale) * x + shift, expected) <= 1e-13
    assert gap(stats.normalize(tf.constant(x), *arguments, 0.1), expected) <= 1e-13
