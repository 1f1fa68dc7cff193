"""Computes masked moments and normalises by them: pure functions on tensors.

B batch, T timesteps, F features. A frame is one (row, timestep) of a batch; it is
valid where the mask is true. Variances are the biased ones, as in Keras.
"""

from keras import ops


def identity(total):
    """Returns `total` unchanged: the `reduce_sum` of a single replica."""
    return total


def centre(x, valid=None, axes=(0,), reduce_sum=identity):
    """Centres the valid elements of `x` along `axes`, and returns their mean.

    The mean takes two passes. The second pass adds the mean of the centred values, so
    float32 is accurate for a mean far from zero. The function is differentiable in `x`.
    Invalid elements, NaN included, have no effect and a gradient of exactly 0.

    Args:
        x: Float tensor of shape (..., F).
        valid: Boolean tensor broadcastable to `x`, true where an element
            counts. `None` (default): all elements count.
        axes: Tuple of ints, the axes over which the mean is taken. Default: (0,).
        reduce_sum: Function that sums a tensor over replicas. Default: `identity`,
            for a single replica.

    Returns:
        `(mean, centred, count)`: mean and count with the axes kept as size 1, `count`
        with size 1 in its last axis too where `valid` has; `centred` of the shape of
        `x`, 0 where not valid. If no element is valid, the mean is 0.
    """

    def total(values):
        return reduce_sum(ops.sum(values, axis=axes, keepdims=True))

    def only_valid(values):
        return values if valid is None else ops.where(valid, values, 0.0)

    counted = ops.ones_like(x[..., :1])
    if valid is not None:
        counted = counted * ops.cast(valid, x.dtype)
    count = total(counted)
    divisor = ops.maximum(count, 1.0)

    shift = ops.stop_gradient(total(only_valid(x)) / divisor)
    shifted = only_valid(x - shift)
    remainder = total(shifted) / divisor
    return shift + remainder, only_valid(shifted - remainder), count


def masked_moments(x, valid=None, axes=(0,), reduce_sum=identity):
    """Computes mean, variance and count of the valid elements of `x` along `axes`.

    The variance is computed from centred values. The arguments, gradients and precision
    are those of `centre`.

    Returns:
        `(mean, variance, count)`, with the axes kept as size 1. `count` has size
        1 in its last axis too where `valid` has. If no element is valid, mean and
        variance are 0.
    """
    mean, centred, count = centre(x, valid, axes, reduce_sum)
    squares = reduce_sum(ops.sum(ops.square(centred), axis=axes, keepdims=True))
    return mean, squares / ops.maximum(count, 1.0), count


def pool(means, variances, counts, reduce_sum=identity):
    """Computes the moments of a union of groups from the moments of each group.

    The pooled variance is the mean of the variances plus the variance of the means,
    both weighted by the counts. It equals the variance of all the elements together.

    Args:
        means, variances: Tensors of shape (N, F), a row for each group.
        counts: Tensor of shape (N, 1), the number of elements of each group. Groups
            of 0 elements have no effect.
        reduce_sum: As in `masked_moments`.

    Returns:
        `(mean, variance, count)` of shapes (F,), (F,) and (1,).
    """

    def total(values):
        return reduce_sum(ops.sum(values, axis=0))

    count = total(counts)
    share = counts / ops.maximum(count, 1.0)
    mean = total(share * means)
    # Adds the rounding error of the mean, which matters for means far from zero.
    mean = mean + total(share * (means - mean))
    variance = total(share * (variances + ops.square(means - mean)))
    return mean, variance, count


def scale_and_shift(mean, variance, gamma, beta, epsilon):
    """Returns the scale and shift that normalise by given moments.

    `gamma * (a - mean) / sqrt(variance + epsilon) + beta = scale * a + shift`.

    Args:
        mean, variance: Tensors of shape (..., F).
        gamma, beta: Tensors of shape (F,), or `None` for 1 and 0.
        epsilon: Float added to the variance.

    Returns:
        `(scale, shift)`, each of the shape of `mean`.
    """
    scale = ops.rsqrt(variance + epsilon)
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta
    return scale, shift


def normalize(x, mean, variance, gamma, beta, epsilon):
    """Normalises `x`: `gamma * (x - mean) / sqrt(variance + epsilon) + beta`.

    This function centres before it scales, unlike `scale_and_shift`. It keeps its
    precision if the mean is large compared with the standard deviation.
    """
    scale, _ = scale_and_shift(mean, variance, gamma, None, epsilon)
    normalized = (x - mean) * scale
    return normalized if beta is None else normalized + beta
