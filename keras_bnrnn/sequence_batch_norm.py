"""Defines `SequenceBatchNorm`: batch normalisation of sequences without padding."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_bnrnn import backend, types
from keras_bnrnn import statistics as stats
from keras_bnrnn.checks import (
    check_dtype,
    check_flag,
    check_numeric,
    check_positive_number,
    check_training,
    is_number,
    naming_arguments,
)
from keras_bnrnn.config import explained
from keras_bnrnn.frames import Frames
from keras_bnrnn.population import Population


@keras.saving.register_keras_serializable(package="keras_bnrnn")
class SequenceBatchNorm(keras.layers.Layer):
    """Normalises sequences by the statistics of their valid frames.

    For each feature k

    `y_k = gamma_k * (x_k - E[x_k]) / sqrt(Var[x_k] + epsilon) + beta_k`

    In training, E and Var are taken over every valid frame of the batch
    (`statistics="sequence"`), or over the rows at each timestep t alone
    (`statistics="frame"`). The timestep t counts the valid frames of a sequence from 0.
    At inference, and in a frozen layer (`trainable=False`), E and Var are the
    population statistics `moving_mean` and `moving_variance`, and no variable changes.

    The population statistics are moving averages. The k-th training step weighs its
    batch by `max(1 - momentum, 1 / k)`. The first step therefore copies the statistics
    of its batch, and the initial values 0 and 1 have no effect. Three kinds of batches
    do not change the population statistics: a batch without a valid frame, a batch
    whose mean or variance is not finite, and with `"frame"` a batch with a single valid
    row at each timestep. The layer warns once of each of the last two kinds, but not
    under XLA. `nonfinite_batches` counts the second kind. `keras_bnrnn.recalibrate`
    replaces the moving averages by the exact statistics of a data set.

    Sequence-wise statistics include later timesteps of the training batch. Use
    `"frame"` in a model that predicts the next frame.

    Args:
        statistics: `"sequence"` (default) or `"frame"`, see above.
        population: `"pooled"`, the only value: one mean and variance of the valid
            frames of all timesteps.
        max_timesteps: Must be `None`.
        momentum: Float in [0, 1), the weight of the past in the moving averages.
            Default: 0.99.
        epsilon: Float > 0, added to the variance. Default: 1e-3.
        center: Whether there is a `beta`. Default: `True`.
        scale: Whether there is a `gamma`. Default: `True`.
        synchronized: Whether batch statistics are taken over all replicas of
            a `tf.distribute` strategy. Default: `False`.
        gamma_initializer: Initializer of `gamma`. Default: `"ones"`.
        beta_initializer: Initializer of `beta`. Default: `"zeros"`.
        gamma_regularizer: Regularizer of `gamma`. Default: `None`.
        beta_regularizer: Regularizer of `beta`. Default: `None`.
        gamma_constraint: Constraint of `gamma`. Default: `None`.
        beta_constraint: Constraint of `beta`. Default: `None`.
        **kwargs: `name`, `dtype`, `trainable` of `keras.layers.Layer`. Statistics are
            float64 in a float64 layer, and float32 with all other dtypes.

    Call arguments:
        inputs: Tensor of shape (B, T, ..., F).
        mask: Boolean tensor of shape (B, T), or (B, T, ...) without the features,
            true at valid frames, any pattern. Default: `None`, all frames are valid.
        training: Whether to normalise by batch statistics and to update the population
            statistics. `None` (default) takes the value of the calling layer or model.

    Returns:
        A tensor of the shape of `inputs`. In training, masked positions are finite but
        unspecified.

    Raises:
        ValueError: If an argument is out of range, if the rank of the inputs is below
            3, if the mask has another shape, or in frame-wise training with a single
            value at each timestep.

    Example:

    >>> x = np.random.default_rng(0).normal(5.0, 3.0, (8, 20, 4)).astype("float32")
    >>> y = SequenceBatchNorm()(x, training=True)
    >>> round(abs(float(np.mean(y))), 3)
    0.0

    Reference: [Laurent et al., 2016](https://arxiv.org/abs/1510.01378),
    sections 3 and 4.
    """

    stock_layer = keras.layers.BatchNormalization

    def __init__(
        self,
        statistics: types.Statistics = "sequence",
        population: types.Population = "pooled",
        max_timesteps: int | None = None,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        synchronized: bool = False,
        gamma_initializer: types.Initializer = "ones",
        beta_initializer: types.Initializer = "zeros",
        gamma_regularizer: types.Regularizer = None,
        beta_regularizer: types.Regularizer = None,
        gamma_constraint: types.Constraint = None,
        beta_constraint: types.Constraint = None,
        **kwargs: Any,
    ) -> None:
        with naming_arguments(kwargs):
            super().__init__(**kwargs)
        check_dtype(self.dtype_policy, kwargs.get("dtype"))
        if statistics not in ("sequence", "frame"):
            raise ValueError(
                "`statistics` must be 'sequence' or 'frame'. "
                f"Received: statistics={statistics!r}"
            )
        if population == "timestep":
            raise ValueError(
                "`population` must be 'pooled': 'timestep' is not available yet. "
                f"Received: population={population!r}"
            )
        if population != "pooled":
            raise ValueError(
                f"`population` must be 'pooled'. Received: population={population!r}"
            )
        if max_timesteps is not None:
            raise ValueError(
                "`max_timesteps` must be None: it belongs to `population='timestep'`, "
                f"which is not available yet. Received: max_timesteps={max_timesteps!r}"
            )
        if not is_number(momentum) or not 0.0 <= momentum < 1.0:
            raise ValueError(
                f"`momentum` must be in [0, 1). Received: momentum={momentum!r}"
            )
        check_positive_number("epsilon", epsilon)
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
        with naming_arguments(locals()):
            self.gamma_initializer = keras.initializers.get(gamma_initializer)
            self.beta_initializer = keras.initializers.get(beta_initializer)
            self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
            self.beta_regularizer = keras.regularizers.get(beta_regularizer)
            self.gamma_constraint = keras.constraints.get(gamma_constraint)
            self.beta_constraint = keras.constraints.get(beta_constraint)
        self.supports_masking = True
        self._population = None

    def build(self, input_shape: types.Shape) -> None:
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
        self._population = Population(
            self.moving_mean,
            self.moving_variance,
            self.update_count,
            # Not a weight of the layer: Keras neither saves nor counts it.
            keras.Variable(
                initializer="zeros",
                shape=(),
                dtype="float32",
                trainable=False,
                autocast=False,
                aggregation="only_first_replica",
                name="nonfinite_batches",
            ),
            self.momentum,
        )
        self.input_spec = keras.layers.InputSpec(min_ndim=3, axes={-1: features})

    @property
    def nonfinite_batches(self) -> int:
        """Number of training batches with a mean or variance that is not finite.

        These batches are left out of the population statistics. The count starts at 0
        when the layer is created, and is not saved.
        """
        if self._population is None:
            return 0
        return int(ops.convert_to_numpy(self._population.nonfinite_batches))

    @property
    def statistics_dtype(self) -> str:
        """The dtype of the statistics: float32, or float64 in a float64 layer."""
        return "float64" if self.variable_dtype == "float64" else "float32"

    def call(
        self,
        inputs: types.Tensor,
        mask: types.Tensor | None = None,
        training: bool | None = None,
    ) -> types.Tensor:
        check_training(training)
        check_numeric("inputs", inputs)
        x = ops.cast(inputs, self.statistics_dtype)
        valid = None if mask is None else self._valid_frames(mask, inputs)
        if self.uses_batch_statistics(training):
            y = self._normalize_by_batch(x, valid)
        else:
            y = self._normalize_by_population(x)
            if valid is not None:
                # Padding is normalised too, as in the stock layer, but NaN in padding
                # must not reach gradients.
                clean = self._normalize_by_population(ops.where(valid, x, 0.0))
                y = ops.where(valid, clean, ops.stop_gradient(y))
        return ops.cast(y, self.compute_dtype)

    def _normalize_by_batch(self, x, valid):
        axes = list(range(len(x.shape) - 1))  # all but the features
        if self.statistics == "sequence":
            return self._normalize_and_learn(x, valid, axes)
        axes.remove(1)
        self.require_group_size(x.shape, axes)
        if valid is None:
            return self._normalize_and_learn(x, valid, axes)
        # Timesteps count the valid frames of each sequence: move these to the front.
        inner = list(range(2, len(valid.shape)))
        frames = Frames(ops.any(valid, axis=inner), time_major=False)
        is_valid = ops.cast(frames.arrange(ops.cast(valid, x.dtype)), "bool")
        y = self._normalize_and_learn(frames.arrange(x), is_valid, axes)
        return frames.restore(y)

    def _normalize_and_learn(self, x, valid, axes):
        if valid is not None:
            x = ops.where(valid, x, 0.0)
        moments = self.batch_moments(x, valid, tuple(axes))
        self.update_statistics(*moments, frame_wise=self.statistics == "frame")
        return stats.normalize(x, *moments[:2], *self.affine(), self.epsilon)

    def _normalize_by_population(self, x):
        mean, variance = map(ops.copy, self._population.row())
        return stats.normalize(x, mean, variance, *self.affine(), self.epsilon)

    def uses_batch_statistics(self, training: bool | None) -> bool:
        """Returns whether a call normalises by the moments of the batch."""
        return bool(training) and self.trainable

    def batch_moments(
        self, x: types.Tensor, valid: types.Tensor | None, axes: tuple[int, ...]
    ) -> tuple[types.Tensor, types.Tensor, types.Tensor]:
        """Computes `statistics.masked_moments`, over all replicas if synchronized."""
        return stats.masked_moments(x, valid, axes, self.reduce_sum)

    @property
    def reduce_sum(self) -> Callable[[types.Tensor], types.Tensor]:
        """The function that sums batch sums over replicas, if synchronized."""
        return backend.sum_over_replicas if self.synchronized else stats.identity

    def scale_and_shift(self) -> tuple[types.Tensor, types.Tensor]:
        """Returns the scale and shift of inference: two tensors of shape (F,)."""
        return stats.scale_and_shift(
            *self._population.row(), *self.affine(), self.epsilon
        )

    def update_statistics(
        self,
        means: types.Tensor,
        variances: types.Tensor,
        counts: types.Tensor,
        frame_wise: bool = False,
        across_steps: bool = False,
    ) -> None:
        """Updates the population statistics by batch moments: `Population.update`."""
        self._population.update(
            means, variances, counts, frame_wise, across_steps, self.path
        )

    @property
    def statistics_variables(self) -> tuple[keras.Variable, ...]:
        """The variables that `update_statistics` changes."""
        return self._population.variables

    def set_statistics(self, mean: types.Tensor, variance: types.Tensor) -> None:
        """Sets the population statistics (F,); later training moves on from them."""
        self._population.set(mean, variance)

    def set_scale_and_shift(self, scale: types.Tensor, shift: types.Tensor) -> None:
        """Sets gamma and beta so that inference computes `scale * x + shift`.

        This undoes the current population statistics. The layer needs `scale=True` and
        `center=True`.

        Args:
            scale, shift: Arrays of shape (F,), or floats.
        """
        variance = ops.convert_to_numpy(self.moving_variance).astype("float64")
        self.gamma.assign(scale * np.sqrt(variance + self.epsilon))
        # Takes the rounded scale of inference, so that a large mean cancels.
        self.beta.assign(np.zeros(self.beta.shape))
        offset = ops.convert_to_numpy(self.scale_and_shift()[1]).astype("float64")
        self.beta.assign(shift - offset)

    def require_group_size(
        self,
        shape: types.Shape,
        axes: Sequence[int],
        cause: str = "`statistics='frame'`",
    ) -> None:
        """Raises an error if training statistics would be those of a single value.

        Args:
            shape: The shape of the inputs.
            axes: The axes over which moments are taken.
            cause: Text for the message, the argument that makes statistics frame-wise.
        """
        size = 1
        for axis in axes:
            size = None if None in (size, shape[axis]) else size * shape[axis]
        if size == 1 and not self.synchronized:
            raise ValueError(
                f"With {cause} training statistics are frame-wise, over the rows of "
                "the batch at each timestep: the batch must have more than one row. "
                f"Received: statistics={self.statistics!r} with inputs of "
                f"shape {tuple(shape)}"
            )

    def affine(self) -> tuple[types.Tensor | None, types.Tensor | None]:
        """Returns `gamma` and `beta` in the statistics' dtype, `None` if not used."""
        gamma, beta = self.gamma, self.beta
        if gamma is not None:
            gamma = ops.cast(gamma, self.statistics_dtype)
        if beta is not None:
            beta = ops.cast(beta, self.statistics_dtype)
        return gamma, beta

    def _valid_frames(self, mask, inputs):
        """Returns the mask as booleans that broadcast to `inputs`."""
        check_mask(mask, inputs.shape, may_be_full=True)
        mask = ops.cast(mask, "bool")
        for _ in range(len(inputs.shape) - len(mask.shape)):
            mask = ops.expand_dims(mask, -1)
        return mask  # (B, T, 1, ..., 1) or (B, T, ..., 1)

    def compute_output_shape(self, input_shape: types.Shape) -> types.Shape:
        return input_shape

    def get_config(self) -> types.Config:
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

    @classmethod
    def from_config(cls, config: types.Config) -> Self:
        with explained(cls, config):
            return super().from_config(config)


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


def check_mask(mask, shape, may_be_full=False):
    """Raises an error if the shape of a mask does not match that of the inputs.

    Args:
        mask: Tensor or array.
        shape: Shape of the inputs, (B, T, ..., F).
        may_be_full: Whether the mask may also have the shape (B, T, ...) of the inputs
            without the features, as from `keras.layers.Masking`. Default: `False`.
    """
    check_numeric("mask", mask)
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
