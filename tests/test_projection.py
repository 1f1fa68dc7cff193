"""The normalised input projection against NumPy, in float64."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import as_replicas, gap, randomize

from keras_bnrnn import SequenceBatchNorm, projection

T, B, D, F = 5, 4, 3, 2
MOMENTS = pytest.mark.parametrize("by_moments", [False, True])
MASKED = pytest.mark.parametrize("masked", [False, True])


def make_norm(rng, **arguments):
    """A norm with random weights that takes the statistics of its next batch."""
    norm = SequenceBatchNorm(**{"dtype": "float64", **arguments})
    norm.build((None, None, F))
    randomize(norm, rng)
    norm.update_count.assign(0.0)
    return norm


def batch(rng, masked=True):
    """Frames (T, B, D), a kernel, and which frames are valid: some at each timestep."""
    frames, kernel = rng.normal(2.0, 1.5, (T, B, D)), rng.normal(size=(D, F))
    if not masked:
        return frames, kernel, None
    valid = rng.random((T, B, 1)) < 0.6
    valid[:, 0], valid[1, 1:] = True, False  # one valid row at the second timestep
    return frames, kernel, valid


def constants(*arrays):
    return [None if array is None else tf.constant(array) for array in arrays]


def moments_of(projected, valid, axes):
    weights = np.ones(projected.shape) if valid is None else valid + 0.0 * projected
    mean = np.average(projected, axes, weights, keepdims=True)
    return mean, np.average((projected - mean) ** 2, axes, weights, keepdims=True)


def expected_of(norm, frames, kernel, valid):
    """The normalised projection, and the moments of all valid frames."""
    projected = frames @ kernel
    axes = (1,) if norm.statistics == "frame" else (0, 1)
    mean, variance = moments_of(projected, valid, axes)
    y = (projected - mean) / np.sqrt(variance + norm.epsilon)
    if norm.gamma is not None:
        y = y * norm.gamma.numpy()
    if norm.beta is not None:
        y = y + norm.beta.numpy()
    return y, [a[0, 0] for a in moments_of(projected, valid, (0, 1))]


def result_of(parts):
    inputs, kernel, bias = parts
    y = inputs if kernel is None else inputs @ kernel
    return y if bias is None else y + bias


def check(norm, parts, frames, kernel, valid, allowed=1e-12):
    """1e-12, of numbers of order 1 to 10 in float64."""
    expected, moments = expected_of(norm, frames, kernel, valid)
    where = np.ones((T, B, 1), bool) if valid is None else valid
    y = result_of(parts)
    assert y.shape == expected.shape
    assert gap(where * y, where * expected) <= allowed
    for found, wanted in zip(
        (norm.moving_mean, norm.moving_variance), moments, strict=True
    ):
        assert found.shape == wanted.shape and gap(found, wanted) <= allowed
    assert norm.update_count == 1.0


@MASKED
@MOMENTS
@pytest.mark.parametrize("affine", [False, True])
def test_sequence_wise_statistics(by_moments, masked, affine, rng, monkeypatch):
    """By the moments of the frames, whose kernel is folded, or of the projection."""
    asked = []
    monkeypatch.setattr(
        projection, "moments_are_cheaper", lambda *a: asked.append(a) or by_moments
    )
    norm = make_norm(rng, center=affine, scale=affine)
    arrays = batch(rng, masked)
    parts = projection.normalized_projection(norm, *constants(*arrays))
    assert asked == [((T, B, D), F)]
    assert (parts[1] is not None) == by_moments
    assert (parts[2] is not None) == affine
    check(norm, parts, *arrays)


@MASKED
def test_frame_wise_statistics(masked, rng):
    norm = make_norm(rng, statistics="frame")
    arrays = batch(rng, masked)
    parts = projection.normalized_projection(norm, *constants(*arrays))
    assert parts[1] is None and parts[2] is None
    check(norm, parts, *arrays)


def test_frame_wise_statistics_of_single_rows(rng):
    """A batch of one row is refused; timesteps of one valid row teach nothing."""
    norm = make_norm(rng, statistics="frame")
    before = norm.get_weights()
    frames, kernel, _ = batch(rng)
    with pytest.raises(ValueError, match=r"more than one row.*\(1, 5, 3\)"):
        projection.normalized_projection(norm, *constants(frames[:, :1], kernel))
    one_row = np.arange(B)[None, :, None] == np.zeros((T, 1, 1))
    with pytest.warns(UserWarning, match="single row"):
        projection.normalized_projection(norm, *constants(frames, kernel, one_row))
    for a, b in zip(norm.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)
    # One timestep has statistics if it has rows.
    projection.normalized_projection(norm, *constants(frames[:1], kernel))
    assert norm.update_count == 1.0


@MASKED
@pytest.mark.parametrize("synchronized", [False, True])
def test_a_folded_projection(synchronized, masked, rng, monkeypatch):
    used = []
    variance = projection.variance_of_projection
    monkeypatch.setattr(
        projection, "variance_of_projection", lambda *a: used.append(1) or variance(*a)
    )
    norm = make_norm(rng, synchronized=synchronized)
    arrays = batch(rng, masked)
    parts = projection.folded_projection(norm, *constants(*arrays))
    assert parts[1] is not None
    # The condition inside the variance of moments allows no sum over replicas.
    assert bool(used) != synchronized
    check(norm, parts, *arrays)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("statistics", ["sequence", "frame"])
def test_synchronized_replicas_equal_one(statistics, folded, rng, monkeypatch):
    """Each replica has its own rows; one replica has one valid row."""
    if folded and statistics == "frame":
        pytest.skip("frame-wise statistics do not fold")
    frames, kernel, valid = batch(rng)
    valid[:, 3] = False
    functions, norms = [], []
    function = projection.normalized_projection
    if folded:
        function = projection.folded_projection
    for rows in (slice(0, 2), slice(2, 4)):
        norm = make_norm(
            np.random.default_rng(1), statistics=statistics, synchronized=True
        )
        arrays = constants(frames[:, rows], kernel, valid[:, rows])
        norms.append(norm)
        functions.append(lambda norm=norm, arrays=arrays: function(norm, *arrays))
    results = as_replicas(monkeypatch, *functions)
    joined = tf.concat([result_of(parts) for parts in results], axis=1)
    for norm in norms:
        check(norm, (joined, None, None), frames, kernel, valid)


@MOMENTS
@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_of_one_frame_and_of_none(count, by_moments, rng, monkeypatch):
    """One frame has a mean, and its result is beta. No frame changes nothing."""
    monkeypatch.setattr(projection, "moments_are_cheaper", lambda *_: by_moments)
    frames, kernel, _ = batch(rng)
    valid = np.zeros((T, B, 1), bool)
    valid[2, 1] = count
    norm = make_norm(rng)
    before = norm.get_weights()
    y = result_of(
        projection.normalized_projection(norm, *constants(frames, kernel, valid))
    )
    assert np.all(np.isfinite(y))
    if count == 0:
        for a, b in zip(norm.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)
        return
    assert gap(y[2, 1], norm.beta) <= 1e-12
    assert gap(norm.moving_mean, frames[2, 1] @ kernel) <= 1e-12
    assert gap(norm.moving_variance, 0.0) == 0.0


@MOMENTS
def test_mixed_precision_keeps_the_dtype_of_the_kernel(by_moments, rng, monkeypatch):
    """Half precision in and out, and statistics in float32: 5e-3 of order 1."""
    monkeypatch.setattr(projection, "moments_are_cheaper", lambda *_: by_moments)
    frames, kernel, valid = batch(rng)
    frames, kernel = frames.astype("float16"), kernel.astype("float16")
    for statistics in ("sequence", "frame"):
        norm = make_norm(rng, statistics=statistics, dtype="mixed_float16")
        parts = projection.normalized_projection(
            norm, *constants(frames, kernel, valid)
        )
        for part in parts:
            assert part is None or part.dtype == tf.float16
        wide = frames.astype("float64"), kernel.astype("float64"), valid
        expected, moments = expected_of(norm, *wide)
        y = tf.cast(result_of(parts), tf.float64)
        assert gap(valid * y, valid * expected) <= 2e-2
        assert gap(norm.moving_mean, moments[0]) <= 5e-3


# The variance of a projection


def centred_frames(rng, collinear=False, count=30):
    x = rng.normal(size=(count, D)) * [1.0, 2.0, 0.5]
    if collinear:
        x[:, 1] = x[:, 0] + 1e-3 * x[:, 1]
    x[:-4] -= x[:-4].mean(0)
    x[-4:] = 0.0  # invalid frames
    return x


def weights_of(rng, collinear):
    """Random weights, or ones whose first column takes a difference of features."""
    w = rng.normal(size=(D, F))
    if collinear:
        w[:, 0] = 1.0, -1.0, 0.0
    return w


COLLINEAR = pytest.mark.parametrize("collinear", [False, True])


@COLLINEAR
def test_variance_and_its_gradients(collinear, rng):
    """Against NumPy: `2 x w w' / n`, `2 x' x w / n`. 1e-12, of numbers of order 1."""
    x, w = centred_frames(rng, collinear), weights_of(rng, collinear)
    upstream, n = rng.normal(size=(1, F)), len(x) - 4
    x_tensor, w_tensor, count = constants(x, w, np.full((1, 1), float(n)))
    assert projection.variance_by_covariance(x_tensor, w_tensor, count)[2] == collinear
    with tf.GradientTape() as tape:
        tape.watch([x_tensor, w_tensor])
        variance = projection.variance_of_projection(x_tensor, w_tensor, count)
        loss = tf.reduce_sum(variance * upstream)
    of_x, of_w = tape.gradient(loss, [x_tensor, w_tensor])
    assert variance.shape == (1, F)
    assert gap(variance, np.sum((x @ w) ** 2, 0, keepdims=True) / n) <= 1e-12
    assert gap(of_x, 2.0 * (x @ w * upstream) @ w.T / n) <= 1e-12
    assert gap(of_w, 2.0 * x.T @ (x @ w * upstream) / n) <= 1e-12


@COLLINEAR
def test_second_derivatives_of_the_variance(collinear, rng):
    """Of `sum(gradient * along)`, by central differences of the first in closed form.

    The first derivatives are cubic in the arguments: a step of 1e-4 leaves 1e-8.
    """
    x, w = centred_frames(rng, collinear), weights_of(rng, collinear)
    upstream, n = rng.normal(size=(1, F)), len(x) - 4
    along_x, along_w = rng.normal(size=x.shape), rng.normal(size=w.shape)
    count = tf.constant([[float(n)]], tf.float64)
    arguments = constants(x, w)
    with tf.GradientTape() as outer:
        outer.watch(arguments)
        with tf.GradientTape() as inner:
            inner.watch(arguments)
            variance = projection.variance_of_projection(*arguments, count)
            loss = tf.reduce_sum(variance * upstream)
        of_x, of_w = inner.gradient(loss, arguments)
        total = tf.reduce_sum(of_x * along_x) + tf.reduce_sum(of_w * along_w)
    found = outer.gradient(total, arguments)

    def first(shift):
        moved_x, moved_w = x + shift * along_x, w + shift * along_w
        projected = moved_x @ moved_w * upstream
        return 2.0 * projected @ moved_w.T / n, 2.0 * moved_x.T @ projected / n

    for a, ahead, behind in zip(found, first(1e-4), first(-1e-4), strict=True):
        assert gap(a, (ahead - behind) / 2e-4) <= 1e-6


def test_variance_by_covariance_equals_numpy(rng):
    x, w = centred_frames(rng), weights_of(rng, False)
    n = len(x) - 4
    variance, product, cancels = projection.variance_by_covariance(
        *constants(x, w, np.full((1, 1), float(n)))
    )
    assert variance.shape == (1, F) and not cancels
    assert gap(variance, np.sum((x @ w) ** 2, 0, keepdims=True) / n) <= 1e-13
    assert gap(product, x.T @ x @ w / n) <= 1e-13


@pytest.mark.parametrize("ratio", [900.0, 1100.0])
@pytest.mark.parametrize("columns", [[True, True], [True, False], [False, True]])
def test_one_column_that_cancels_is_enough(columns, ratio, rng):
    """`(sum_i |w_i| s_i)^2` is 900 or 1100 times the variance, or as large.

    The features a and a + e, e perpendicular to a, and the weights 1 and -1: the
    variance is e' e / n, and the bound some (2 |a|)^2 / n.
    """
    a, e = np.linalg.qr(rng.normal(size=(20, 2)))[0].T
    e = e * 2.0 / np.sqrt(ratio)
    x = 3.0 * np.stack([a, a + e], axis=1)
    w = np.array([[1.0, 1.0] if cancels else [0.5, 0.7] for cancels in columns]).T
    w[1, columns] *= -1.0
    deviations = np.sqrt(np.mean(x**2, 0))
    variance = np.mean((x @ w) ** 2, 0)
    ratios = (np.abs(w) * deviations[:, None]).sum(0) ** 2 / variance
    assert np.all((ratios > 1000.0) == (np.array(columns) & (ratio > 1000.0)))
    found = projection.variance_by_covariance(*constants(x, w, np.full((1, 1), 20.0)))
    assert bool(found[2]) == (ratio > 1000.0)


def test_a_variance_of_zero_does_not_cancel():
    x, w = np.zeros((6, D)), np.ones((D, F))
    found = projection.variance_by_covariance(*constants(x, w, np.zeros((1, 1))))
    assert not found[2] and gap(found[0], 0.0) == gap(found[1], 0.0) == 0.0


def test_the_rule_counts_operations():
    """`D^2 (N + F) < 150 N F`, with N = 1000 if the number of frames is unknown."""
    for timesteps in (1, 7, 200, None):
        for rows in (1, 32, None):
            n = 1000 if None in (timesteps, rows) else timesteps * rows
            for width in (1, 30, 300, 3000):
                for features in (1, 50, 2000):
                    expected = width**2 * (n + features) < 150 * n * features
                    shape = timesteps, rows, width
                    found = projection.moments_are_cheaper(shape, features)
                    assert found == expected
    # Equal costs: the projection is taken.
    assert not projection.moments_are_cheaper((3, 1, 15), 3)
    assert not projection.moments_are_cheaper((None, 2, 300), 1500)
    assert not projection.moments_are_cheaper((20, None, 300), 1500)
