"""Population statistics: the mean and variance that inference uses."""

import warnings

from keras import ops

from keras_bnrnn import backend
from keras_bnrnn import statistics as stats


class Population:
    """Moving averages of the moments of training batches.

    The k-th update weighs its batch by `max(1 - momentum, 1 / k)`. This is a plain
    object: the layer that owns the variables tracks and saves them.

    Args:
        mean, variance: Variables of shape (F,).
        update_count: Variable of shape (), the number k of updates so far.
        nonfinite_batches: Variable of shape (), the number of batches left out because
            their moments were not finite.
        momentum: Float in [0, 1).
    """

    def __init__(self, mean, variance, update_count, nonfinite_batches, momentum):
        self.mean = mean
        self.variance = variance
        self.update_count = update_count
        self.nonfinite_batches = nonfinite_batches
        self.momentum = momentum
        self._warned = set()

    @property
    def variables(self):
        """The variables that `update` changes."""
        return (
            self.mean,
            self.variance,
            self.update_count,
            self.nonfinite_batches,
        )

    def row(self, t=None):
        """Returns mean and variance, each (F,), at t: the same for every t."""
        return ops.convert_to_tensor(self.mean), ops.convert_to_tensor(self.variance)

    def update(
        self,
        means,
        variances,
        counts,
        frame_wise=False,
        across_steps=False,
        name="SequenceBatchNorm",
    ):
        """Moves the statistics towards those of a batch, over all replicas.

        A batch changes nothing if it has no valid frame, if the pooled moments of its
        replica are not finite, or if it is `frame_wise` and no group has two frames.

        Args:
            means, variances: Tensors of shape (..., F), the moments of each of the
                groups that make up the batch.
            counts: Tensor of shape (..., 1), the number of frames of each group.
            frame_wise: Whether the groups are timesteps, each normalised by its own
                moments. Default: `False`.
            across_steps: Whether successive updates are successive timesteps of one
                batch, from inside a loop. The distances between their means then belong
                to the pooled variance. Default: `False`.
            name: Name of the layer in warnings.
        """
        features = self.mean.shape[0]
        means = ops.reshape(ops.stop_gradient(means), (-1, features))
        variances = ops.reshape(ops.stop_gradient(variances), (-1, features))
        counts = ops.reshape(ops.stop_gradient(counts), (-1, 1))
        mean, variance, count = stats.pool(means, variances, counts)
        finite = ops.all(ops.isfinite(mean)) & ops.all(ops.isfinite(variance))
        usable = finite
        if frame_wise:
            is_single = ops.logical_not(ops.any(counts >= 2.0))
            self._warn_if(is_single & (count[0] > 0), SINGLE_ROWS, name)
            usable = usable & ops.logical_not(is_single)
        mean, variance, count = (
            ops.where(usable, value, 0.0) for value in (mean, variance, count)
        )
        nonfinite = ops.cast(ops.logical_not(finite), "float32")
        if not across_steps and backend.replica_count() > 1:
            # Replicas cannot exchange sums inside a time loop.
            mean, variance, count = stats.pool(
                mean[None], variance[None], count[None], backend.sum_over_replicas
            )
            nonfinite = ops.minimum(backend.sum_over_replicas(nonfinite), 1.0)
        self.nonfinite_batches.assign_add(nonfinite)
        self._warn_if(nonfinite > 0, NONFINITE, name)
        self._move(mean, variance, count, across_steps)

    def _move(self, mean, variance, count, across_steps):
        seen = count > 0  # (1,)
        k = self.update_count + 1.0
        least = ops.convert_to_tensor(1.0 - self.momentum, k.dtype)
        weight = ops.maximum(least, 1.0 / ops.maximum(k, 1.0))
        if across_steps:
            distance = ops.square(mean - self.mean)
            variance = variance + (1.0 - weight) * distance
        for variable, new in ((self.mean, mean), (self.variance, variance)):
            old = ops.convert_to_tensor(variable)
            moved = old * (1.0 - weight) + new * weight
            variable.assign(ops.where(seen, moved, old))
        updates = ops.convert_to_tensor(self.update_count)
        self.update_count.assign(ops.where(seen[0], k, updates))

    def set(self, mean, variance):
        """Sets the statistics; later training moves on from them.

        Args:
            mean, variance: Arrays of shape (F,).
        """
        self.mean.assign(mean)
        self.variance.assign(variance)
        # After this many updates a batch weighs 1 - momentum. The next training step
        # then does not overwrite these statistics.
        settled = 1.0 / (1.0 - self.momentum)
        self.update_count.assign(ops.maximum(self.update_count, settled))

    def _warn_if(self, condition, message, name):
        """Warns if a boolean scalar tensor is true, once for each message."""

        def warn():
            if message not in self._warned:
                self._warned.add(message)
                warnings.warn(message.format(name=name), stacklevel=2)

        backend.call_if(condition, warn)


NONFINITE = (
    "A training batch of layer {name!r} has a mean or variance that is not finite: its "
    "inputs are NaN, infinite or too large. Such batches are left out of the "
    "population statistics. `nonfinite_batches` counts them."
)

SINGLE_ROWS = (
    "A training batch of layer {name!r} has a single row at each timestep. Frame-wise "
    "statistics are taken over the rows, so every output is `beta`, and the batch is "
    "left out of the population statistics. Use batches of 2 rows or more, or "
    "`statistics='sequence'`."
)
