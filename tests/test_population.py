"""The moving averages of `Population`, against NumPy in float64."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import as_replicas, gap

from keras_bnrnn.population import Population

F = 3


def make(momentum=0.9, count=0.0):
    """A population of mean 1, 2, 3 and variance 4, 5, 6."""

    def variable(value):
        return keras.Variable(np.asarray(value, "float64"), dtype="float64")

    return Population(
        variable(np.arange(1.0, F + 1)),
        variable(np.arange(4.0, F + 4)),
        variable(count),
        keras.Variable(0.0, dtype="float32"),
        momentum,
    )


def values(population):
    return [keras.ops.convert_to_numpy(v).copy() for v in population.variables]


def update(population, means, variances, counts, **options):
    """Updates without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        population.update(
            *(tf.constant(a, tf.float64) for a in (means, variances, counts)), **options
        )


def moments(rng, *shape):
    """Random means, variances and counts of the groups of a batch."""
    return (
        rng.normal(2.0, 3.0, (*shape, F)),
        rng.uniform(0.5, 2.0, (*shape, F)),
        rng.integers(1, 9, (*shape, 1)).astype("float64"),
    )


def pooled(means, variances, counts):
    """The moments of the elements of all groups."""
    means, variances = means.reshape(-1, F), variances.reshape(-1, F)
    share = counts.reshape(-1, 1) / counts.sum()
    mean = np.sum(share * means, 0)
    return mean, np.sum(share * (variances + (means - mean) ** 2), 0)


def assert_moved(population, mean, variance, count, nonfinite=0):
    """1e-13, of numbers of order 1 to 10 in float64."""
    expected = [mean, variance, count, nonfinite]
    for found, wanted in zip(values(population), expected, strict=True):
        assert gap(found, wanted) <= 1e-13


@pytest.mark.parametrize("count", [0.0, 1.0, 4.0, 20.0])
def test_an_update_weighs_its_batch_by_1_minus_momentum_or_1_over_k(count, rng):
    for shape in ((1,), (1, 1), (4,), (2, 3)):
        for frame_wise in (False, True):
            population = make(count=count)
            old_mean, old_variance, *_ = values(population)
            batch = moments(rng, *shape)
            batch[2].flat[0] = 2.0
            update(population, *batch, frame_wise=frame_wise)
            mean, variance = pooled(*batch)
            w = max(0.1, 1.0 / (count + 1.0))
            assert_moved(
                population,
                (1 - w) * old_mean + w * mean,
                (1 - w) * old_variance + w * variance,
                count + 1.0,
            )


def test_updates_of_successive_timesteps_include_the_distance_of_means(rng):
    """The k-th timestep of the first batch: the moments of all k timesteps."""
    population = make(momentum=0.999)
    means, variances, _ = moments(rng, 4)
    for k in range(1, 5):
        update(population, means[k - 1], variances[k - 1], [5.0], across_steps=True)
        expected = pooled(means[:k], variances[:k], np.ones((k, 1)))
        assert_moved(population, *expected, k)


def test_a_batch_of_one_frame_is_a_batch():
    population = make()
    update(population, [[7.0, 8.0, 9.0]], [[0.0] * F], [[1.0]])
    assert_moved(population, [7.0, 8.0, 9.0], 0.0, 1.0)


@pytest.mark.parametrize("frame_wise", [False, True])
@pytest.mark.parametrize("count", [0.0, 3.0])
def test_a_batch_without_frames_changes_nothing(count, frame_wise, rng):
    population = make(count=count)
    before = values(population)
    means, variances, counts = moments(rng, 2)
    update(population, means, variances, 0.0 * counts, frame_wise=frame_wise)
    assert_moved(population, *before)


@pytest.mark.parametrize("part", ["mean", "variance"])
@pytest.mark.parametrize("components", [slice(0, 1), slice(None)], ids=["one", "all"])
def test_a_batch_that_is_not_finite_is_counted_and_named_once(part, components, rng):
    population = make(count=3.0)
    *before, _ = values(population)
    means, variances, counts = moments(rng, 2)
    (means if part == "mean" else variances)[0, components] = np.inf
    arguments = [tf.constant(a) for a in (means, variances, counts)]
    with pytest.warns(UserWarning, match="'a/norm'.*not finite") as caught:
        for _ in range(2):
            population.update(*arguments, name="a/norm")
    assert len(caught) == 1
    assert_moved(population, *before, 2)


@pytest.mark.parametrize("counts", [[1.0], [1.0, 1.0], [0.0, 1.0]], ids=str)
def test_single_rows_are_named_and_left_out(counts, rng):
    population = make(count=3.0)
    before = values(population)
    means, variances, _ = moments(rng, len(counts))
    counts = np.array(counts)
    arguments = [tf.constant(a) for a in (means, variances, counts)]
    with pytest.warns(UserWarning, match="'SequenceBatchNorm'.*single row"):
        population.update(*arguments, frame_wise=True)
    assert_moved(population, *before)
    # Groups of single frames are a batch if statistics are not frame-wise.
    update(population, means, variances, counts)
    assert values(population)[2] == 4.0


def test_one_group_of_two_rows_is_enough(rng):
    population = make()
    means, variances, counts = moments(rng, 3)
    counts[:] = [[1.0], [2.0], [0.0]]
    update(population, means, variances, counts, frame_wise=True)
    assert_moved(population, *pooled(means, variances, counts), 1.0)


def test_both_warnings_are_shown(rng):
    """One of them does not silence the other."""
    population = make()
    one = [tf.constant(a) for a in moments(rng, 1)]
    bad = [one[0] * np.nan, *one[1:]]
    with pytest.warns(UserWarning, match="single row"):
        population.update(*one[:2], 0.0 * one[2] + 1.0, frame_wise=True)
    with pytest.warns(UserWarning, match="not finite"):
        population.update(*bad)


@pytest.mark.parametrize("momentum, settled", [(0.9, 10.0), (0.5, 2.0), (0.0, 1.0)])
@pytest.mark.parametrize("count", [0.0, 50.0])
def test_training_moves_on_from_set_statistics(count, momentum, settled, rng):
    population = make(momentum, count)
    mean, variance = rng.normal(size=F), rng.uniform(1.0, 2.0, F)
    population.set(mean, variance)
    assert_moved(population, mean, variance, max(count, settled))
    for found, wanted in zip(population.row(5), (mean, variance), strict=True):
        assert gap(found, wanted) == 0.0
    batch = moments(rng, 1)
    update(population, *batch)
    w = max(1.0 - momentum, 1.0 / (max(count, settled) + 1.0))
    new_mean, new_variance = pooled(*batch)
    assert_moved(
        population,
        (1 - w) * mean + w * new_mean,
        (1 - w) * variance + w * new_variance,
        max(count, settled) + 1.0,
    )


# Replicas


def update_on_replicas(monkeypatch, *batches, **options):
    """Updates a population for each batch, as replicas; returns the populations."""
    populations = [make() for _ in batches]

    def call(population, batch):
        return lambda: population.update(*map(tf.constant, batch), **options)

    as_replicas(monkeypatch, *map(call, populations, batches))
    return populations


@pytest.mark.parametrize("count", [2, 3])
def test_replicas_learn_one_population(count, rng, monkeypatch):
    batches = [moments(rng, 2) for _ in range(count)]
    batches[1][2][:] = 0.0  # without a valid frame
    expected = pooled(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
    for population in update_on_replicas(monkeypatch, *batches):
        assert_moved(population, *expected, 1.0)


def test_replicas_exchange_nothing_inside_a_time_loop(rng, monkeypatch):
    batches = [moments(rng, 1) for _ in range(2)]
    populations = update_on_replicas(monkeypatch, *batches, across_steps=True)
    for population, (mean, variance, _) in zip(populations, batches, strict=True):
        assert_moved(population, mean[0], variance[0], 1.0)


@pytest.mark.parametrize("bad", [1, 2])
def test_replicas_that_are_not_finite_are_left_out(bad, rng, monkeypatch):
    """The batch counts once, however many of its replicas are not finite."""
    batches = [moments(rng, 2) for _ in range(2)]
    for batch in batches[:bad]:
        batch[1][0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        populations = update_on_replicas(monkeypatch, *batches)
    for population in populations:
        if bad == 2:
            assert_moved(population, *values(make())[:3], nonfinite=1.0)
        else:
            assert_moved(population, *pooled(*batches[1]), 1.0, nonfinite=1.0)
