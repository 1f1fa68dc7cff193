"""An independent oracle: the recurrences as plain float64 loops over timesteps.

Written from the equations alone, with NumPy and TensorFlow, so that a test which
compares a layer with it compares two separate readings of the mathematics. It is
slow and means to be obvious.

Shapes: B batch, T timesteps, D input features, U units, G gates. Gate order is
Keras': LSTM i, f, c, o; GRU z, r, h. `weights` is a dict of

- `kernel` (D, G*U), `recurrent_kernel` (U, G*U);
- `gamma`, `beta` (G*U,), and for inference `moving_mean`, `moving_variance` (G*U,);
- `recurrent_bias` (3U,), optional, for a GRU with `reset_after`;
- `peephole` (3, U), optional, for an LSTM: the diagonal weights on i and f, times
  c_{t-1}, and on o, times c_t. Their terms stay outside the normalisation.
"""

import numpy as np
import tensorflow as tf


def rnn_inference(
    kind,
    x,
    mask,
    weights,
    *,
    normalize="input",
    epsilon=1e-3,
    reset_after=True,
    go_backwards=False,
    initial_state=None,
    zero_output_for_mask=False,
):
    """Runs the recurrence in NumPy with the moving statistics.

    Args:
        kind: `"simple_rnn"`, `"lstm"` or `"gru"`.
        x: array (B, T, D). What stands in masked frames, NaN included, has no effect.
        mask: bool array (B, T), true where a frame is real, or None.
        weights: dict of arrays, see the module's docstring.
        normalize: `"input"`, `BN(W x) + U h`, or `"joint"`, `BN(W x + U h)`. For
            the candidate of a GRU the latter is `BN(W_h x + r * (U_h h + b_h))`, or
            `BN(W_h x + U_h (r * h))` without `reset_after`.
        epsilon: float, added to the variance.
        reset_after: bool, GRU only: the reset gate acts after the recurrent product.
        go_backwards: bool, walk from the last column of x and mask to the first.
        initial_state: list of arrays (B, U), `[h]` or `[h, c]`; None for zeros.
        zero_output_for_mask: bool, whether a masked frame outputs zeros instead of
            the previous output.

    Returns:
        Outputs (B, T, U) in processing order, and the list of final states.
    """
    _check(kind, weights, normalize, "sequence", reset_after)
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = np.asarray(x, np.float64)
    mask = np.ones(x.shape[:2], bool) if mask is None else np.asarray(mask, bool)
    z = np.where(mask[:, :, None], x, 0.0) @ w["kernel"]  # (B, T, GU)

    def norm(a, t, part):
        mean, variance = w["moving_mean"][part], w["moving_variance"][part]
        return _scale_and_shift(a, mean, variance, w, part, epsilon)

    outputs, states, _ = _loop(
        np,
        kind,
        norm(z, None, slice(None)) if normalize == "input" else z,
        mask,
        w,
        _identity if normalize == "input" else norm,
        reset_after,
        go_backwards,
        initial_state,
        zero_output_for_mask,
    )
    return outputs, states


def rnn_training(
    kind,
    x,
    mask,
    weights,
    statistics="sequence",
    *,
    normalize="input",
    epsilon=1e-3,
    reset_after=True,
    go_backwards=False,
    initial_state=None,
    zero_output_for_mask=False,
    z=None,
):
    """Runs the recurrence in TensorFlow with the statistics of the batch itself.

    Differentiable by `tf.GradientTape` in x, the weights, the initial state, and,
    with `normalize="input"`, in `info["pre_activations"]`.

    Args:
        kind, x, mask, weights: as in `rnn_inference`, as float64 tensors.
        statistics: `"sequence"`, over all valid frames of the batch together, or
            `"frame"`, over the rows at each t alone, where t counts a row's own valid
            frames in processing order. `"joint"` takes the latter in either case.
        normalize, epsilon, reset_after, go_backwards, initial_state,
            zero_output_for_mask: as in `rnn_inference`.
        z: tensor (B, T, G*U) to stand in for W x, or None; `"input"` only.

    Returns:
        Outputs (B, T, U) in processing order, the list of final states, and a dict:
        `pre_activations` (B, T, G*U), what was normalised, in the order of x (for
        `"joint"` a record, zero in masked frames, upstream of nothing); their
        `mean` and biased `variance` (G*U,) over all valid frames of all timesteps;
        `count`, the number of those frames.

    Raises:
        ValueError: if `z` is given with `normalize="joint"`.
    """
    _check(kind, weights, normalize, statistics, reset_after)
    if z is not None and normalize == "joint":
        raise ValueError('`z` needs normalize="input". Received: normalize="joint"')
    w = {name: tf.cast(value, tf.float64) for name, value in weights.items()}
    x = tf.cast(x, tf.float64)
    mask = tf.ones(x.shape[:2], bool) if mask is None else tf.cast(mask, tf.bool)
    valid = mask[:, :, None]
    # Padding is cleaned before any product: 0 * NaN would poison the gradient.
    zero = tf.zeros([], tf.float64)
    if z is None:
        z = tf.where(valid, x, zero) @ w["kernel"]  # (B, T, GU)
    z = tf.cast(z, tf.float64)
    clean = tf.where(valid, z, zero)

    def norm(a, t, part):
        # t is None: over all frames together; else over the rows of that column.
        mean, variance, _ = _batch_moments(a, mask if t is None else mask[:, t])
        return _scale_and_shift(a, mean, variance, w, part, epsilon)

    everything = slice(None)
    options = reset_after, go_backwards, initial_state, zero_output_for_mask
    if normalize == "input" and statistics == "sequence":
        projected = norm(clean, None, everything)
        outputs, states, _ = _loop(tf, kind, projected, mask, w, _identity, *options)
    else:
        # Each row's frames in processing order, so that column t holds its t-th one.
        order = _columns(mask, go_backwards)
        projected = _picked(clean, order)
        mask_of_t = tf.constant([[c is not None for c in row] for row in order])

        def norm_at(a, t, part):
            mean, variance, _ = _batch_moments(a, mask_of_t[:, t])
            return _scale_and_shift(a, mean, variance, w, part, epsilon)

        if normalize == "input":
            columns = [
                norm_at(projected[:, t], t, everything) for t in range(z.shape[1])
            ]
            projected = tf.stack(columns, axis=1)
        outputs, states, totals = _loop(
            tf,
            kind,
            projected,
            mask_of_t,
            w,
            norm_at if normalize == "joint" else _identity,
            reset_after,
            False,
            initial_state,
            False,
        )
        outputs = _spread(outputs, order, mask, go_backwards, zero_output_for_mask)
        if normalize == "joint":
            z = _unpicked(totals, order)
    mean, variance, count = _batch_moments(z, mask)
    info = {"mean": mean, "variance": variance, "count": count, "pre_activations": z}
    return outputs, states, info


def moving_average(batches, momentum):
    """Folds batch moments into moving ones, starting from mean 0 and variance 1.

    The k-th update, k from 1, weighs its batch by `max(1 - momentum, 1 / k)`.

    Args:
        batches: list of (mean, variance), in the order of the updates.
        momentum: float in [0, 1).

    Returns:
        The final mean and variance, float64.
    """
    mean, variance = np.float64(0.0), np.float64(1.0)
    for k, (batch_mean, batch_variance) in enumerate(batches, start=1):
        share = max(1.0 - momentum, 1.0 / k)
        mean = (1.0 - share) * mean + share * np.asarray(batch_mean, np.float64)
        batch_variance = np.asarray(batch_variance, np.float64)
        variance = (1.0 - share) * variance + share * batch_variance
    return mean, variance


def pooled_moments(z, mask):
    """Returns the mean and biased variance (F,) of the valid frames of z, in float64.

    Args:
        z: array (B, T, F).
        mask: bool array (B, T), true where a frame is real, or None.

    Raises:
        ValueError: if no frame is valid: there is nothing to take a mean of.
    """
    z = np.asarray(z, np.float64)
    mask = np.ones(z.shape[:2], bool) if mask is None else np.asarray(mask, bool)
    frames = z[mask]  # (n, F)
    if not len(frames):
        raise ValueError("`mask` must hold a valid frame. Received: none")
    mean = frames.mean(axis=0)
    return mean, ((frames - mean) ** 2).mean(axis=0)


def gates_of_rows(
    kind, x, mask, weights, *, normalize="input", epsilon=1e-3, go_backwards=False
):
    """Computes gates with the moving statistics, one sequence and frame at a time.

    Args:
        kind, x, mask, weights, normalize, epsilon, go_backwards: as in
            `rnn_inference`; a GRU is one with `reset_after`.

    Returns:
        A dict from each gate to its values (frames, U), of the valid frames of all
        rows; and a list with, for each row, what is normalised: (frames, G*U), the
        valid frames in processing order.
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    units = w["recurrent_kernel"].shape[0]
    names = {"simple_rnn": "h", "lstm": "ifco", "gru": "zrh"}[kind]
    values, rows = {name: [] for name in names}, []

    def normed(a, part=slice(None)):
        spread = np.sqrt(w["moving_variance"][part] + epsilon)
        standard = (a - w["moving_mean"][part]) / spread
        return w["gamma"][part] * standard + w["beta"][part]

    def sigmoid(a):
        return 1.0 / (1.0 + np.exp(-a))

    joint = normalize == "joint"
    for frames, valid in zip(np.asarray(x, np.float64), mask, strict=True):
        frames = frames[valid][::-1] if go_backwards else frames[valid]
        h, c, row = np.zeros(units), np.zeros(units), []
        for frame in frames:
            wx, uh = w["kernel"].T @ frame, w["recurrent_kernel"].T @ h
            if kind == "gru":
                uh = uh + w.get("recurrent_bias", np.zeros(3 * units))
                first, last = slice(0, 2 * units), slice(2 * units, None)
                sums = wx + uh
                a = normed(sums)[first] if joint else normed(wx)[first] + uh[first]
                z, r = np.split(sigmoid(a), 2)
                sums[last] = wx[last] + r * uh[last]
                a = normed(sums)[last] if joint else normed(wx)[last] + r * uh[last]
                found = z, r, np.tanh(a)
                h = z * h + (1.0 - z) * found[2]
            else:
                sums = wx + uh
                a = normed(sums) if joint else normed(wx) + uh
            if kind == "simple_rnn":
                h = np.tanh(a)
                found = (h,)
            if kind == "lstm":
                a_i, a_f, a_c, a_o = np.split(a, 4)
                p_i, p_f, p_o = w.get("peephole", np.zeros((3, units)))
                i, f = sigmoid(a_i + p_i * c), sigmoid(a_f + p_f * c)
                candidate = np.tanh(a_c)
                c = f * c + i * candidate
                o = sigmoid(a_o + p_o * c)
                found = i, f, candidate, o
                h = o * np.tanh(c)
            row.append(sums if joint else wx)
            for name, value in zip(names, found, strict=True):
                values[name].append(value)
        rows.append(np.reshape(row, (-1, len(w["gamma"]))))
    return {name: np.array(value) for name, value in values.items()}, rows


def gaps(rows, mean, variance, *, frame_wise=False, epsilon=1e-3):
    """Computes the gaps between the statistics of a batch and given ones.

    Args:
        rows: list of arrays (frames, F), the valid frames of each row.
        mean, variance: arrays (F,), the population statistics.
        frame_wise: bool, whether the t-th frames of all rows form a group each. Else
            all frames are one group.
        epsilon: float, added to the variances.

    Returns:
        Two arrays (F,), the means over all frames of the gaps of their groups: of the
        mean in standard deviations, and the absolute logarithm of the variance ratio.
    """
    groups = [np.concatenate(rows)]
    if frame_wise:
        longest = max(map(len, rows))
        groups = [
            np.array([row[t] for row in rows if t < len(row)]) for t in range(longest)
        ]
    of_means, of_variances = [], []
    for group in groups:
        of_mean = np.abs(group.mean(axis=0) - mean) / np.sqrt(variance + epsilon)
        ratio = (group.var(axis=0) + epsilon) / (variance + epsilon)
        of_means += [of_mean] * len(group)
        of_variances += [np.abs(np.log(ratio))] * len(group)
    return np.mean(of_means, axis=0), np.mean(of_variances, axis=0)


def _check(kind, weights, normalize, statistics, reset_after):
    """Rejects what the oracle would otherwise silently ignore."""
    for name, value, known in (
        ("kind", kind, tuple(_STEPS)),
        ("normalize", normalize, ("input", "joint")),
        ("statistics", statistics, ("sequence", "frame")),
    ):
        if value not in known:
            raise ValueError(f"`{name}` must be in {known}. Received: {name}={value!r}")
    if "peephole" in weights and kind != "lstm":
        raise ValueError(f'`peephole` needs kind="lstm". Received: kind={kind!r}')
    if "recurrent_bias" in weights and not (kind == "gru" and reset_after):
        raise ValueError(
            '`recurrent_bias` needs kind="gru" and reset_after=True. '
            f"Received: kind={kind!r}, reset_after={reset_after}"
        )


def _scale_and_shift(a, mean, variance, w, part, epsilon):
    """gamma * (a - mean) / sqrt(variance + epsilon) + beta, of the components part."""
    return w["gamma"][part] * (a - mean) / (variance + epsilon) ** 0.5 + w["beta"][part]


def _batch_moments(a, mask):
    """Mean, biased variance (F,) and count of the valid frames of a TensorFlow a.

    Of no frame they are 0, 0 and 0, so that values and gradients stay finite.
    """
    frames = tf.boolean_mask(a, mask)  # (n, F)
    count = tf.cast(tf.shape(frames)[0], tf.float64)
    divisor = tf.maximum(count, 1.0)
    mean = tf.reduce_sum(frames, axis=0) / divisor
    variance = tf.reduce_sum((frames - mean) ** 2, axis=0) / divisor
    return mean, variance, count


def _columns(mask, go_backwards):
    """For each row the columns of its valid frames in processing order, then `None`."""
    order = []
    for row in np.asarray(mask):
        columns = [int(c) for c in np.flatnonzero(row)]
        columns = columns[::-1] if go_backwards else columns
        order.append(columns + [None] * (len(row) - len(columns)))
    return order


def _picked(a, order):
    """Row by row the frames (F,) of a (B, T, F) at the columns, zeros for `None`."""
    zero = tf.zeros_like(a[0, 0])
    return tf.stack(
        [
            tf.stack([zero if c is None else a[b, c] for c in row])
            for b, row in enumerate(order)
        ]
    )


def _unpicked(a, order):
    """The inverse: what was picked, at its column; zeros in masked frames."""
    zero = tf.zeros_like(a[0, 0])
    rows = []
    for b, row in enumerate(order):
        found = {c: a[b, t] for t, c in enumerate(row) if c is not None}
        rows.append(tf.stack([found.get(c, zero) for c in range(len(row))]))
    return tf.stack(rows)


def _spread(outputs, order, mask, go_backwards, zero_output_for_mask):
    """Outputs by t as outputs by column, in processing order."""
    zero = tf.zeros_like(outputs[0, 0])
    rows = []
    for b, row in enumerate(np.asarray(mask)):
        t, previous, spread = 0, zero, []
        for valid in row[::-1] if go_backwards else row:
            if valid:
                previous, t = outputs[b, t], t + 1
            spread.append(zero if zero_output_for_mask and not valid else previous)
        rows.append(tf.stack(spread))
    return tf.stack(rows)


def _identity(a, t, part):
    return a


def _loop(
    lib,
    kind,
    projected,
    mask,
    w,
    norm,
    reset_after,
    go_backwards,
    initial_state,
    zero_output_for_mask,
):
    """The time loop; `lib` is `np` or `tf`, whose calls used here agree.

    `projected` (B, T, G*U) is the share of x in the pre-activations and
    `norm(a, t, part)` normalises, at column t, their components `part`. Returns the
    outputs and final states, and what `norm` was given, (B, T, G*U) in x's order.
    """
    batch, timesteps = projected.shape[:2]
    units = w["recurrent_kernel"].shape[0]
    zeros = lib.zeros((batch, units), lib.float64)
    if initial_state is None:
        states = [zeros] * (2 if kind == "lstm" else 1)
    else:
        to_float64 = np.asarray if lib is np else tf.cast
        states = [to_float64(state, lib.float64) for state in initial_state]
    previous, outputs, totals = zeros, [], [None] * timesteps
    for t in reversed(range(timesteps)) if go_backwards else range(timesteps):
        valid = mask[:, t, None]  # (B, 1)

        def norm_at_t(a, part, t=t):
            return norm(a, t, part)

        new, totals[t] = _STEPS[kind](
            lib, projected[:, t], states, w, norm_at_t, reset_after
        )
        output = lib.where(valid, new[0], zeros if zero_output_for_mask else previous)
        states = [lib.where(valid, a, b) for a, b in zip(new, states, strict=True)]
        outputs.append(output)
        previous = output
    return lib.stack(outputs, axis=1), states, lib.stack(totals, axis=1)


def _simple_rnn_step(lib, x, states, w, norm, reset_after):
    """h = tanh(x + U h)."""
    (h,) = states
    a = x + h @ w["recurrent_kernel"]  # (B, U)
    return [lib.tanh(norm(a, slice(None)))], a


def _lstm_step(lib, x, states, w, norm, reset_after):
    """c = f * c + i * tanh(g); h = o * tanh(c)."""
    h, c = states
    u = h.shape[1]
    a = x + h @ w["recurrent_kernel"]  # (B, 4U): i, f, c, o
    n = norm(a, slice(None))
    i, f, g, o = (n[:, k * u : (k + 1) * u] for k in range(4))
    if "peephole" in w:
        i, f = i + w["peephole"][0] * c, f + w["peephole"][1] * c
    c = _sigmoid(lib, f) * c + _sigmoid(lib, i) * lib.tanh(g)
    if "peephole" in w:
        o = o + w["peephole"][2] * c
    return [_sigmoid(lib, o) * lib.tanh(c), c], a


def _gru_step(lib, x, states, w, norm, reset_after):
    """h = z * h + (1 - z) * tanh(candidate)."""
    (h,) = states
    u = h.shape[1]
    gates, candidate = slice(0, 2 * u), slice(2 * u, 3 * u)
    kernel = w["recurrent_kernel"]  # (U, 3U): z, r, h
    bias = w.get("recurrent_bias", lib.zeros((3 * u,), lib.float64))
    a_zr = x[:, gates] + h @ kernel[:, gates] + bias[gates]
    zr = _sigmoid(lib, norm(a_zr, gates))  # (B, 2U): z, r
    z, r = zr[:, :u], zr[:, u:]
    if reset_after:
        recurrent = r * (h @ kernel[:, candidate] + bias[candidate])
    else:
        recurrent = (r * h) @ kernel[:, candidate]
    a_h = x[:, candidate] + recurrent
    new = z * h + (1.0 - z) * lib.tanh(norm(a_h, candidate))
    return [new], lib.concat([a_zr, a_h], axis=1)


_STEPS = {"simple_rnn": _simple_rnn_step, "lstm": _lstm_step, "gru": _gru_step}


def _sigmoid(lib, a):
    # By tanh, which NumPy and TensorFlow share and which does not overflow.
    return 0.5 * (1.0 + lib.tanh(0.5 * a))
