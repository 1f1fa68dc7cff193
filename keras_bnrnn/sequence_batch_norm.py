"""`SequenceBatchNorm`: batch normalisation of sequences, padding left out."""

import numbers
import warnings

import keras
from keras import ops

from keras_bnrnn import statistics as stats
from keras_bnrnn.distribution import replica_count, sum_over_replicas
from keras_bnrnn.notices import Once, warn_if


@keras.saving.register_keras_serializable(package="keras_bnrnn")
class SequenceBatchNorm(keras.layers.Layer):
    """Batch normalisation of sequences, over their valid frames only.

    For each feature k

    `y_k = gamma_k * (x_k - E[x_k]) / sqrt(Var[x_k] + epsilon) + beta_k`

    In training E and Var are the batch's own: over every valid frame of the
    batch (`statistics="sequence"`), or over the rows at each timestep alone
    (`statistics="frame"`). At inference, and where the layer is frozen
    (`trainable=False`), they are the population statistics `moving_mean` and
    `moving_variance`, and no variable changes.

    The k-th training step weighs its batch by `max(1 - momentum, 1 / k)` in the
    moving averages: the first copies the batch, so nothing of the initial 0 and 1
    remains. Three kinds of batches change nothing: one without a valid frame, one
    whose mean or variance is not finite, and under `"frame"` one with a single valid
    row at each timestep. The last two are warned of once (but not under XLA), and
    `nonfinite_batches` counts the second kind.
    `keras_bnrnn.recalibrate` replaces the moving averages by the exact
    statistics of a data set.

    Sequence-wise statistics see all timesteps of the training batch, later ones
    included: a model that predicts the next frame wants `"frame"`.

    Args:
        statistics: `"sequence"` (default) or `"frame"`, see above.
        population: `"pooled"` (default): one mean and variance of all valid
            frames, whatever their timestep. (`"timestep"` is not available yet.)
        max_timesteps: Only for `population="timestep"`. Default: `None`.
        momentum: Float in [0, 1), the weight of the past in the moving averages.
            Default: 0.99.
        epsilon: Float > 0, added to the variance. Default: 1e-3.
        center: Whether there is a `beta`. Default: `True`.
        scale: Whether there is a `gamma`. Default: `True`.
        synchronized: Whether batch statistics are taken over all replicas of
            a `tf.distribute` strategy. Default: `False`.
        gamma_initializer: Initializer of `gamma`. Default: `"ones"`.
        beta_initializer: Initializer of `beta`. Default: `"zeros"`.
        gamma_regularizer, beta_regularizer: Regularizers. Default: `None`.
        gamma_constraint, beta_constraint: Constraints. Default: `None`.
        **kwargs: `name`, `dtype`, `trainable` of `keras.layers.Layer`.
            Statistics are float32 whatever the compute dtype (float64 in a
            float64 layer).

    Call arguments:
        inputs: Tensor of shape (B, T, ..., F).
        mask: Boolean tensor of shape (B, T), or (B, T, ...) without the features,
            true where a frame is valid; any pattern. `None`: all are.
        training: Whether to use, and learn from, the batch's statistics.

    Returns:
        A tensor of the shape of `inputs`. In training, what stands at frames
        that are not valid is finite and means nothing.

    Raises:
        ValueError: For an argument out of range, inputs of rank below 3, a mask
            of another shape, frame-wise training with a static batch of 1.

    Example:

    >>> x = np.random.default_rng(0).normal(5.0, 3.0, (8, 20, 4)).astype("float32")
    >>> y = SequenceBatchNorm()(x, training=True)
    >>> round(abs(float(np.mean(y))), 3)
    0.0

    Reference: [Laurent et al., 2016](https://arxiv.org/abs/1510.01378),
    sections 3 and 4.
    """

    def __init__(
        self,
        statistics="sequence",
        population="pooled",
        max_timesteps=None,
        momentum=0.99,
        epsilon=1e-3,
        center=True,
        scale=True,
        synchronized=False,
        gamma_initializer="ones",
        beta_initializer="zeros",
        gamma_regularizer=None,
        beta_regularizer=None,
        gamma_constraint=None,
        beta_constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if statistics not in ("sequence", "frame"):
            raise ValueError(
                "`statistics` must be 'sequence' or 'frame'. "
                f"Received: statistics={statistics!r}"
            )
        if population == "timestep":
            raise ValueError(
                "`population='timestep'` is not available yet: use 'pooled'. "
                f"Received: population={population!r}"
            )
        if population != "pooled":
            raise ValueError(
                f"`population` must be 'pooled'. Received: population={population!r}"
            )
        if max_timesteps is not None:
            raise ValueError(
                "`max_timesteps` belongs to `population='timestep'`, which is not "
                f"available yet. Received: max_timesteps={max_timesteps!r}"
            )
        if not is_number(momentum) or not 0.0 <= momentum < 1.0:
            raise ValueError(
                f"`momentum` must be in [0, 1). Received: momentum={momentum!r}"
            )
        if not is_number(epsilon) or not epsilon > 0.0:
            raise ValueError(
                f"`epsilon` must be greater than 0. Received: epsilon={epsilon!r}"
            )
        for name, flag in (
            ("center", center),
            ("scale", scale),
            ("synchronized", synchronized),
        ):
            check_flag(name, flag)
        self.statistics = statistics
        self.population = population
        self.max_timesteps = max_timesteps
        self.momentum = momentum
        self.epsilon = epsilon
        self.center = center
        self.scale = scale
        self.synchronized = synchronized
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.beta_initializer = keras.initializers.get(beta_initializer)
        self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
        self.beta_regularizer = keras.regularizers.get(beta_regularizer)
        self.gamma_constraint = keras.constraints.get(gamma_constraint)
        self.beta_constraint = keras.constraints.get(beta_constraint)
        self.supports_masking = True
        self._untracked = _Untracked()

    def build(self, input_shape):
        if len(input_shape) < 3:
            raise ValueError(
                "`inputs` must have a rank of at least 3: (batch, timesteps, ..., "
                f"features). Received: inputs of shape {tuple(input_shape)}"
            )
        features = input_shape[-1]
        if features is None:
            raise ValueError(
                "The last dimension of `inputs` must be known. "
                f"Received: inputs of shape {tuple(input_shape)}"
            )
        # `autocast=False`: normalisation is computed in the statistics' dtype
        # even where the layer computes in half precision.
        self.gamma = self.beta = None
        if self.scale:
            self.gamma = self.add_weight(
                shape=(features,),
                name="gamma",
                initializer=self.gamma_initializer,
                regularizer=self.gamma_regularizer,
                constraint=self.gamma_constraint,
                autocast=False,
            )
        if self.center:
            self.beta = self.add_weight(
                shape=(features,),
                name="beta",
                initializer=self.beta_initializer,
                regularizer=self.beta_regularizer,
                constraint=self.beta_constraint,
                autocast=False,
            )

        def statistic(name, shape, initializer, aggregation):
            return self.add_weight(
                shape=shape,
                name=name,
                initializer=initializer,
                dtype=self.statistics_dtype,
                trainable=False,
                autocast=False,
                aggregation=aggregation,
            )

        self.moving_mean = statistic("moving_mean", (features,), "zeros", "mean")
        self.moving_variance = statistic("moving_variance", (features,), "ones", "mean")
        self.update_count = statistic("update_count", (), "zeros", "only_first_replica")
        self._untracked.nonfinite_batches = keras.Variable(
            initializer="zeros",
            shape=(),
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
            name="nonfinite_batches",
        )

    @property
    def nonfinite_batches(self):
        """Int: training batches that were left out of the population statistics
        because their mean or variance was not finite.

        It counts from the layer's creation and is not saved.
        """
        count = self._untracked.nonfinite_batches
        return 0 if count is None else int(ops.convert_to_numpy(count))

    @property
    def statistics_dtype(self):
        """Float32, or float64 in a float64 layer, whatever the compute dtype."""
        return "float64" if self.variable_dtype == "float64" else "float32"

    def call(self, inputs, mask=None, training=None):
        x = ops.cast(inputs, self.statistics_dtype)
        valid = None if mask is None else self._valid_frames(mask, inputs)
        if self.uses_batch_statistics(training):
            y = self._normalize_by_batch(x, valid)
        else:
            y = self._normalize_by_population(x)
            if valid is not None:
                # As a stock layer has it in padding, but NaN there stays out of the
                # gradients.
                clean = self._normalize_by_population(ops.where(valid, x, 0.0))
                y = ops.where(valid, clean, ops.stop_gradient(y))
        return ops.cast(y, self.compute_dtype)

    def _normalize_by_batch(self, x, valid):
        if valid is not None:
            x = ops.where(valid, x, 0.0)
        axes = list(range(len(x.shape) - 1))  # all but the features
        if self.statistics == "frame":
            axes.remove(1)
            self.require_group_size(x.shape, axes)
        moments = self.batch_moments(x, valid, tuple(axes))
        self.update_statistics(*moments, frame_wise=self.statistics == "frame")
        return stats.normalize(x, *moments[:2], *self.affine(), self.epsilon)

    def _normalize_by_population(self, x):
        mean, variance = map(ops.copy, (self.moving_mean, self.moving_variance))
        return stats.normalize(x, mean, variance, *self.affine(), self.epsilon)

    def uses_batch_statistics(self, training):
        """Whether a call with this `training` normalises by the batch's moments."""
        return bool(training) and self.trainable

    def batch_moments(self, x, valid, axes):
        """`statistics.masked_moments`, over all replicas where synchronized."""
        return stats.masked_moments(x, valid, axes, self.reduce_sum)

    @property
    def reduce_sum(self):
        """What adds up the batch's sums: over all replicas where synchronized."""
        return sum_over_replicas if self.synchronized else stats.identity

    def scale_and_shift(self):
        """The affine map that inference applies: two tensors of shape (F,)."""
        return stats.scale_and_shift(
            ops.convert_to_tensor(self.moving_mean),
            ops.convert_to_tensor(self.moving_variance),
            *self.affine(),
            self.epsilon,
        )

    def update_statistics(
        self, means, variances, counts, frame_wise=False, across_steps=False
    ):
        """Moves the population statistics towards a batch's, that of all replicas.

        A batch changes nothing if it has no valid frame, if the pooled moments of its
        replica are not finite, or if it is `frame_wise` and no group has two frames.

        Args:
            means, variances: Tensors of shape (..., F), the moments of each of the
                groups that make up the batch.
            counts: Tensor of shape (..., 1), the frames in each.
            frame_wise: Whether the groups are timesteps, each normalised by its own
                moments.
            across_steps: Whether successive updates are successive timesteps of
                one batch, from inside a loop. Their means then differ for good
                reason, and what they differ by belongs to the pooled variance.
        """
        features = self.moving_mean.shape[0]
        means = ops.reshape(ops.stop_gradient(means), (-1, features))
        variances = ops.reshape(ops.stop_gradient(variances), (-1, features))
        counts = ops.reshape(ops.stop_gradient(counts), (-1, 1))
        mean, variance, count = stats.pool(means, variances, counts)
        finite = ops.all(ops.isfinite(mean)) & ops.all(ops.isfinite(variance))
        usable = finite
        if frame_wise:
            is_single = ops.logical_not(ops.any(counts >= 2.0))
            self._warn_of_single_rows(is_single & (count[0] > 0))
            usable = usable & ops.logical_not(is_single)
        mean, variance, count = (
            ops.where(usable, value, 0.0) for value in (mean, variance, count)
        )
        nonfinite = ops.cast(ops.logical_not(finite), "float32")
        if not across_steps and replica_count() > 1:
            # Replicas cannot meet inside a loop.
            mean, variance, count = stats.pool(
                mean[None], variance[None], count[None], sum_over_replicas
            )
            nonfinite = ops.minimum(sum_over_replicas(nonfinite), 1.0)
        self._untracked.nonfinite_batches.assign_add(nonfinite)
        self._warn_of_nonfinite(nonfinite > 0)

        seen = count > 0  # (1,)
        k = self.update_count + 1.0
        least = ops.convert_to_tensor(1.0 - self.momentum, k.dtype)
        weight = ops.maximum(least, 1.0 / ops.maximum(k, 1.0))
        if across_steps:
            distance = ops.square(mean - self.moving_mean)
            variance = variance + (1.0 - weight) * distance

        for variable, new in (
            (self.moving_mean, mean),
            (self.moving_variance, variance),
        ):
            moved = variable * (1.0 - weight) + new * weight
            variable.assign(ops.where(seen, moved, variable))
        self.update_count.assign(ops.where(seen[0], k, self.update_count))

    @property
    def statistics_variables(self):
        """The variables that `update_statistics` changes."""
        return (
            self.moving_mean,
            self.moving_variance,
            self.update_count,
            self._untracked.nonfinite_batches,
        )

    def _warn_of_nonfinite(self, condition):
        def warn():
            self._untracked.notices.warn(
                "nonfinite",
                f"A training batch of layer {self.path!r} has a mean or variance that "
                "is not finite: its inputs are NaN, infinite or too large. Such "
                "batches are left out of the population statistics, and "
                "`nonfinite_batches` counts them.",
            )

        warn_if(condition, warn)

    def _warn_of_single_rows(self, condition):
        def warn():
            self._untracked.notices.warn(
                "single rows",
                f"A training batch of layer {self.path!r} has a single row at each "
                "timestep, and frame-wise statistics are taken over the rows: every "
                "output is `beta`, and the batch is left out of the population "
                "statistics. Use batches of 2 rows or more, or "
                "`statistics='sequence'`.",
            )

        warn_if(condition, warn)

    def set_statistics(self, mean, variance):
        """Sets the population statistics; later training moves on from them.

        Args:
            mean, variance: Arrays of shape (F,).
        """
        self.moving_mean.assign(mean)
        self.moving_variance.assign(variance)
        # As many updates as bring their weight down to 1 - momentum: what is set
        # here is not thrown away by the next training step.
        settled = 1.0 / (1.0 - self.momentum)
        self.update_count.assign(ops.maximum(self.update_count, settled))

    def require_group_size(self, shape, axes, cause="`statistics='frame'`"):
        """Refuses to train on the statistics of what is always a single value.

        Args:
            shape: The shape of the inputs.
            axes: The axes over which moments are taken.
            cause: Why they are taken over no more than that.
        """
        size = 1
        for axis in axes:
            size = None if None in (size, shape[axis]) else size * shape[axis]
        if size == 1 and not self.synchronized:
            raise ValueError(
                f"With {cause} training statistics are frame-wise, over the rows of "
                "the batch at each timestep: it must have more than one. "
                f"Received: statistics={self.statistics!r} with inputs of "
                f"shape {tuple(shape)}"
            )

    def affine(self):
        """`gamma` and `beta` in the dtype of the statistics, `None` where not used."""
        gamma, beta = self.gamma, self.beta
        if gamma is not None:
            gamma = ops.cast(gamma, self.statistics_dtype)
        if beta is not None:
            beta = ops.cast(beta, self.statistics_dtype)
        return gamma, beta

    def _valid_frames(self, mask, inputs):
        """The mask as booleans that broadcast to `inputs`."""
        check_mask(mask, inputs.shape, may_be_full=True)
        mask = ops.cast(mask, "bool")
        for _ in range(len(inputs.shape) - len(mask.shape)):
            mask = ops.expand_dims(mask, -1)
        return mask  # (B, T, 1, ..., 1) or (B, T, ..., 1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "statistics": self.statistics,
            "population": self.population,
            "max_timesteps": self.max_timesteps,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "synchronized": self.synchronized,
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "beta_initializer": keras.initializers.serialize(self.beta_initializer),
            "gamma_regularizer": keras.regularizers.serialize(self.gamma_regularizer),
            "beta_regularizer": keras.regularizers.serialize(self.beta_regularizer),
            "gamma_constraint": keras.constraints.serialize(self.gamma_constraint),
            "beta_constraint": keras.constraints.serialize(self.beta_constraint),
        }


class _Untracked:
    """What a layer keeps that is no weight: Keras does not look into plain objects.

    Attributes:
        nonfinite_batches: Variable of shape (), or `None` before the layer is built.
        notices: The warnings that were given.
    """

    def __init__(self):
        self.nonfinite_batches = None
        self.notices = Once()


def warn_of_nonfinite_batches(norms):
    """Warns if training batches were left out of population statistics.

    Args:
        norms: Iterable of `SequenceBatchNorm`.
    """
    counts = {norm.path: norm.nonfinite_batches for norm in norms}
    counts = {path: count for path, count in counts.items() if count}
    if counts:
        warnings.warn(
            "Training batches whose mean or variance was not finite were left out of "
            "the population statistics: "
            + ", ".join(f"{count} of {path!r}" for path, count in counts.items()),
            stacklevel=3,
        )


def is_number(value):
    """Whether it is a real number, NumPy's included, and not a boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_flag(name, value):
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")


def check_mask(mask, shape, may_be_full=False):
    """Refuses a mask that is not (batch, timesteps) of inputs of this shape.

    Args:
        mask: Tensor or array.
        shape: Shape of the inputs, (B, T, ..., F).
        may_be_full: Whether a mask of shape (B, T, ...), all axes but the features,
            is right, too: `keras.layers.Masking` makes such.
    """
    received = tuple(mask.shape)
    expected = {"(batch, timesteps)": tuple(shape[:2])}
    if may_be_full and len(shape) > 3:
        expected["(batch, timesteps, ...)"] = tuple(shape[:-1])
    fits = any(
        len(received) == len(sizes)
        and all(
            a is None or b is None or a == b
            for a, b in zip(received, sizes, strict=True)
        )
        for sizes in expected.values()
    )
    if not fits:
        shapes = " or ".join(f"{name} = {sizes}" for name, sizes in expected.items())
        raise ValueError(
            f"`mask` must have the shape {shapes} of "
            f"`inputs`. Received: mask of shape {received}"
        )
