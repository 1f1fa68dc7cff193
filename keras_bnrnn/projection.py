"""The input projection of a layer, normalised by the statistics of its batch.

Frames are time-major: T timesteps, B rows, D input features, F = G*U projected ones.
"""

from keras import ops

from keras_bnrnn import backend
from keras_bnrnn import statistics as stats


def normalized_projection(norm, frames, kernel, valid=None):
    """Computes the parts of `BN(frames . kernel)` by batch statistics.

    It updates `norm` by the batch statistics.

    Args:
        norm: The `SequenceBatchNorm` of the projection.
        frames: Tensor of shape (T, B, D). Invalid frames must be finite.
        kernel: Tensor of shape (D, F).
        valid: Boolean tensor of shape (T, B, 1), or `None`.

    Returns:
        `(inputs, kernel, bias)`. The normalised projection is `inputs . kernel + bias`,
        with inputs of shape (T, B, D), or `inputs + bias` if `kernel` is `None`, with
        inputs of shape (T, B, F). `bias` (F,) is `None` if there is nothing to add.
    """
    if norm.statistics == "frame":
        return _by_frame(norm, frames, kernel, valid), None, None
    # Replicas sum the moments of their projections. The moments of the frames need a
    # condition, and no collective operation may be inside one.
    if not norm.synchronized and moments_are_cheaper(frames.shape, kernel.shape[-1]):
        return folded_projection(norm, frames, kernel, valid)
    centred, mean, count = _centred(norm, frames, kernel, valid)
    projected, variance = _by_projection(norm, _flat(centred), kernel, count)
    norm.update_statistics(mean, variance, count)
    shape = (*ops.shape(frames)[:-1], kernel.shape[-1])
    return ops.reshape(projected, shape), None, _bias(norm, kernel)


def folded_projection(norm, frames, kernel, valid=None):
    """Folds normalisation by sequence-wise statistics into the kernel.

    Updates `norm` by the batch statistics, as `normalized_projection` does, but leaves
    the projection to the caller.

    Args:
        norm, frames, kernel, valid: As in `normalized_projection`; the time and batch
            axes may be in any order.

    Returns:
        `(frames, kernel, bias)` such that `frames . kernel + bias` is the normalised
        projection.
    """
    centred, mean, count = _centred(norm, frames, kernel, valid)
    folded = _folded_kernel(norm, centred, kernel, mean, count)
    return centred, folded, _bias(norm, kernel)


def _centred(norm, frames, kernel, valid):
    """Returns centred frames, the mean (1, F) of the projection, and the count (1, 1).

    The projection of centred frames has a mean of 0. Float32 is then accurate for
    frames whose mean is large compared with their deviation.
    """
    dtype = norm.statistics_dtype
    mean, centred, count = stats.centre(
        ops.cast(frames, dtype), valid, (0, 1), norm.reduce_sum
    )
    # Not a matrix product: matrix products on a GPU round float32 to 11 bits.
    mean = ops.reshape(mean, (-1, 1)) * ops.cast(kernel, dtype)
    mean = ops.sum(mean, axis=0, keepdims=True)
    return ops.cast(centred, kernel.dtype), mean, ops.reshape(count, (1, 1))


def _bias(norm, kernel):
    _, beta = norm.affine()
    return None if beta is None else ops.cast(beta, kernel.dtype)


def _folded_kernel(norm, centred, kernel, mean, count):
    """Scales the kernel by gamma over the standard deviation of its projection."""
    dtype = norm.statistics_dtype
    w = ops.cast(kernel, dtype)
    x = _flat(ops.cast(centred, dtype))
    if norm.synchronized:
        variance = _mean_square(norm, ops.matmul(x, w), count)
    else:
        variance = variance_of_projection(x, w, count)
    norm.update_statistics(mean, variance, count)
    return ops.cast(w * _scale(norm, variance), kernel.dtype)


def _flat(frames):
    """Reshapes (T, B, D) to (T*B, D), the only product XLA allows in a condition."""
    return ops.reshape(frames, (-1, frames.shape[-1]))


def _by_projection(norm, centred, kernel, count):
    """Returns the normalised projection (T*B, F) without beta, and its variance."""
    projected = ops.matmul(centred, kernel)
    variance = _mean_square(norm, projected, count)
    return projected * ops.cast(_scale(norm, variance), kernel.dtype), variance


def _mean_square(norm, projected, count):
    """Returns the variance (1, F) of a centred projection (N, F)."""
    squares = ops.square(ops.cast(projected, norm.statistics_dtype))
    total = norm.reduce_sum(ops.sum(squares, axis=0, keepdims=True))
    return total / ops.maximum(count, 1.0)


# In float32 the error of `w' C w` is some 1e-7 to 4e-7 of its Cauchy-Schwarz bound. At
# this ratio of the two the variance is off by at most 4e-4. Independent features have a
# ratio of about 0.6 D.
LARGEST_CANCELLATION = 1000.0


def variance_of_projection(x, w, count):
    """Computes the variance of `x . w`, from the covariance of `x` if it is accurate.

    The gradient is written out. Automatic differentiation keeps the (N, F) tensors of
    the branch that computes the projection, and XLA fills them with zeros in each step
    that does not take this branch: a tenth of a training step.

    Args:
        x, w, count: As in `variance_by_covariance`.

    Returns:
        Tensor of shape (1, F).
    """
    count = ops.maximum(count, 1.0)

    def moments(x, w):
        """Returns the variance, its half gradient (D, F) in w, and `cancels`."""
        variance, product, cancels = variance_by_covariance(x, w, count)

        def by_projection():
            projected = ops.matmul(x, w)
            product = backend.transposed_times(x, projected) / count
            total = ops.sum(ops.square(projected), axis=0, keepdims=True)
            return total / count, product

        variance, product = ops.cond(
            cancels, by_projection, lambda: (variance, product)
        )
        return variance, product, cancels

    def forward(x, w):
        variance, product, cancels = moments(x, w)
        return [variance], [product, cancels]

    def backward(arguments, kept, upstream):
        (x, w), (product, cancels) = arguments, kept
        d = 2.0 * upstream[0]
        scaled = w * (d / count)
        d_x = ops.cond(
            cancels,
            lambda: ops.matmul(ops.matmul(x, w), ops.transpose(scaled)),
            lambda: ops.matmul(x, ops.matmul(w, ops.transpose(scaled))),
        )
        return [d_x, product * d]

    run = backend.custom_gradient(lambda x, w: [moments(x, w)[0]], forward, backward)
    return run(x, w)[0]


def variance_by_covariance(x, w, count):
    """Computes the variance of `x . w` from the covariance of `x`.

    The variance of a projection is `w' C w`, with C the covariance of `x`. This uses
    (D, D) and (D, F) products instead of passes over (N, F). The terms of `w' C w`
    cancel if features are collinear and the weights take their difference. By
    Cauchy-Schwarz `w' C w <= (sum_i |w_i| s_i)^2`, with s_i the standard deviation of
    feature i. A variance that is small compared with this bound is inaccurate.

    Args:
        x: Tensor of shape (N, D), centred, 0 in invalid frames.
        w: Tensor of shape (D, F).
        count: Tensor of shape (1, 1), the number of valid frames.

    Returns:
        `(variance, product, cancels)`: a tensor of shape (1, F), `C w` of shape (D, F),
        and a boolean scalar, true if the variance of any column is inaccurate.
    """
    covariance = backend.transposed_times(x, x) / ops.maximum(count, 1.0)
    product = ops.matmul(covariance, w)
    variance = ops.sum(w * product, axis=0, keepdims=True)
    deviations = ops.sqrt(ops.diagonal(covariance))[:, None]
    bound = ops.square(ops.sum(ops.abs(w) * deviations, axis=0, keepdims=True))
    return variance, product, ops.any(bound > LARGEST_CANCELLATION * variance)


def _by_frame(norm, frames, kernel, valid):
    """Normalises each timestep by the moments of its own valid rows."""
    timesteps, batch, width = frames.shape
    norm.require_group_size((batch, timesteps, width), (0,))
    projected = ops.cast(ops.matmul(frames, kernel), norm.statistics_dtype)
    moments = norm.batch_moments(projected, valid, (1,))
    norm.update_statistics(*moments, frame_wise=True)
    normalized = stats.normalize(projected, *moments[:2], *norm.affine(), norm.epsilon)
    return ops.cast(normalized, kernel.dtype)


def _scale(norm, variance):
    """Returns the factor (1, F) that normalises a centred projection."""
    gamma, _ = norm.affine()
    return stats.scale_and_shift(0.0, variance, gamma, None, norm.epsilon)[0]


def moments_are_cheaper(shape, features):
    """Returns whether moments of the frames cost less than those of the projection.

    The covariance and its product with the kernel take `D^2 (N + F)` multiplications
    for N frames. The projection's own moments, its scaling and their gradients take
    about eight passes over N * F numbers. On CPUs, one pass over a number costs as much
    as about 20 multiplications of a matrix product. Wide inputs and small batches
    therefore use the projection.

    Args:
        shape: (T, B, D), the shape of the frames. If T or B is `None`, N is taken as
            1000, a small batch.
        features: F.
    """
    timesteps, batch, width = shape
    frames = 1000 if None in (timesteps, batch) else timesteps * batch
    return width * width * (frames + features) < 150 * frames * features
