"""Runs an LSTM by TensorFlow's operations for CPUs, for `recurrence.block`.

`BlockLSTMV2` runs all timesteps of the forward loop in one operation. Its gradient,
`BlockLSTMGradV2`, projects and sums weight gradients in each timestep, which is best
for few rows and units. The other gradient here has the product with the recurrent
kernel and `LSTMBlockCellGrad` in its loop. It computes the other products for blocks of
timesteps, while their gradients are in the cache, so no tensor (T, B, 4U) is stacked.
"""

import tensorflow as tf

from keras_bnrnn.backend.loops import added, blocks_back


def forward(frames, states, kernel, recurrent_kernel, bias, turns=None):
    """Runs the forward loop.

    Args:
        frames: float32 tensor of shape (T, B, D).
        states: List of two tensors (B, U): h and c.
        kernel: Tensor (D, 4U), gate order i, f, c, o.
        recurrent_kernel: Tensor (U, 4U).
        bias: Tensor (4U,), or `None`.
        turns: As in `scan`.

    Returns:
        `(sequences, kept)`: h and c after each step, (T, B, U), and a list of tensors
        for `backward`.
    """
    (h, c), units = states, recurrent_kernel.shape[0]
    if bias is None:
        bias = tf.zeros([4 * units], frames.dtype)
    no_peephole = _no_peephole(units, frames.dtype)
    block = tf.raw_ops.BlockLSTMV2(
        seq_len_max=tf.cast(tf.shape(frames)[0] if turns is None else turns, tf.int64),
        x=frames,
        cs_prev=c,
        h_prev=h,
        w=tf.concat([kernel, recurrent_kernel], axis=0),
        b=bias,
        cell_clip=0.0,
        **no_peephole,
    )
    kept = [block.i, block.f, block.o, block.ci, block.co]
    return [block.h, block.cs], kept


def backward(
    frames,
    states,
    kernel,
    recurrent_kernel,
    kept,
    sequences,
    d_sequences,
    d_last,
    turns,
    length,
    is_small,
):
    """Computes the gradients of `forward`.

    Args:
        frames, states, kernel, recurrent_kernel, turns: As in `forward`.
        kept, sequences: What `forward` returned.
        d_sequences: List of the gradients of the first sequences.
        d_last: List of the gradients of the last states.
        length: The number of timesteps of a block, an int or a tensor.
        is_small: Whether to run `BlockLSTMGradV2`, a boolean or a tensor.

    Returns:
        The gradients of frames, h, c, kernel, recurrent kernel and bias.
    """
    arguments = (
        frames,
        states,
        kernel,
        recurrent_kernel,
        kept,
        sequences,
        d_sequences,
        d_last,
        turns,
    )
    if isinstance(is_small, bool):
        if is_small:
            return _in_one_operation(*arguments)
        return _in_a_loop(*arguments, length)
    return tf.cond(
        is_small,
        lambda: _in_one_operation(*arguments),
        lambda: _in_a_loop(*arguments, length),
    )


def _in_one_operation(
    frames,
    states,
    kernel,
    recurrent_kernel,
    kept,
    sequences,
    d_sequences,
    d_last,
    turns,
):
    """Does what `backward` does, by `BlockLSTMGradV2`."""
    (first_h, first_c), (h, c) = states, sequences
    width, units = frames.shape[-1], recurrent_kernel.shape[0]
    timesteps = tf.shape(frames)[0]
    no_peephole = _no_peephole(units, frames.dtype)

    def at_each_timestep(k):
        """Returns the gradient of a state at all timesteps, the last one included."""
        zeros = tf.zeros_like(h[:-1])
        last = tf.concat([zeros, d_last[k][None]], axis=0)
        return last + d_sequences[k] if len(d_sequences) > k else last

    gate_i, gate_f, gate_o, candidate, tanh_c = kept
    gradient = tf.raw_ops.BlockLSTMGradV2(
        seq_len_max=tf.cast(timesteps if turns is None else turns, tf.int64),
        x=frames,
        cs_prev=first_c,
        h_prev=first_h,
        w=tf.concat([kernel, recurrent_kernel], axis=0),
        b=tf.zeros([4 * units], frames.dtype),
        i=gate_i,
        cs=c,
        f=gate_f,
        o=gate_o,
        ci=candidate,
        co=tanh_c,
        h=h,
        cs_grad=at_each_timestep(1),
        h_grad=at_each_timestep(0),
        **no_peephole,
    )
    return [
        gradient.x_grad,
        gradient.h_prev_grad,
        gradient.cs_prev_grad,
        gradient.w_grad[:width],
        gradient.w_grad[width:],
        gradient.b_grad,
    ]


def _in_a_loop(
    frames,
    states,
    kernel,
    recurrent_kernel,
    kept,
    sequences,
    d_sequences,
    d_last,
    turns,
    length,
):
    """Does what `backward` does, in blocks of `length` timesteps."""
    dtype, width = frames.dtype, frames.shape[-1]
    units = recurrent_kernel.shape[0]
    timesteps, rows = tf.shape(frames)[0], tf.shape(frames)[1]
    (first_h, first_c), (h, c) = states, sequences
    # The gradient of `LSTMBlockCellGrad` has the order i, c, f, o.
    transposed = tf.transpose(_swapped(recurrent_kernel))
    transposed_kernel = tf.transpose(_swapped(kernel))
    no_peephole = _no_peephole(units, dtype)
    # The operation checks the shapes of these, and reads nothing else of them.
    no_input = tf.zeros([rows, 1], dtype)
    no_kernel = tf.zeros([1 + units, 4 * units], dtype)
    no_bias = tf.zeros([4 * units], dtype)

    def step_back(t, c_before, dh, dc):
        """Returns the gradients of the gates, and of h and c before the step."""
        h_gradient = dh + d_sequences[0][t] if d_sequences else dh
        c_gradient = dc + d_sequences[1][t] if len(d_sequences) > 1 else dc
        gate_i, gate_f, gate_o, candidate, tanh_c = (value[t] for value in kept)
        step = tf.raw_ops.LSTMBlockCellGrad(
            x=no_input,
            cs_prev=c_before,
            h_prev=c_before,
            w=no_kernel,
            b=no_bias,
            i=gate_i,
            cs=c_before,
            f=gate_f,
            o=gate_o,
            ci=candidate,
            co=tanh_c,
            cs_grad=c_gradient,
            h_grad=h_gradient,
            **no_peephole,
        )
        through = tf.matmul(step.dicfo, transposed)
        return step.dicfo, through, step.cs_prev_grad

    def of_weights(frames, h_before, d_gates):
        """Returns the gradients of kernel, recurrent kernel and bias by some rows."""
        return [
            tf.matmul(frames, d_gates, transpose_a=True),
            tf.matmul(h_before, d_gates, transpose_a=True),
            tf.reduce_sum(d_gates, axis=0),
        ]

    def body(t, carry):
        d_gates, *carry = step_back(t, c[t - 1], *carry)
        return carry, [d_gates]

    def of_block(carry, stacks, start, end):
        # Slices of timesteps are no copies.
        d_gates, before = _flat(stacks[0]), h[start - 1 : end - 1]
        return of_weights(_flat(frames[start:end]), _flat(before), d_gates)

    def finish(d_gates):
        product = tf.matmul(_flat(d_gates), transposed_kernel)
        return tf.reshape(product, [tf.shape(d_gates)[0], rows, width])

    (dh, dc), d_frames, sums = blocks_back(
        body,
        d_last,
        [((states[0].shape[0], 4 * units), dtype)],
        timesteps,
        length,
        [
            tf.zeros(shape, dtype)
            for shape in ([width, 4 * units], [units, 4 * units], [4 * units])
        ],
        of_block,
        finish,
        width,
        turns,
        # Timestep 0 follows the loop: it alone reads the states before the sequence.
        start=1,
    )
    d_gates, dh, dc = step_back(0, first_c, dh, dc)
    sums = added(sums, of_weights(frames[0], first_h, d_gates))
    d_frames = tf.concat([finish(d_gates[None]), d_frames], axis=0)
    return [tf.reshape(d_frames, tf.shape(frames)), dh, dc, *map(_swapped, sums)]


def _no_peephole(units, dtype):
    """Returns the arguments of an operation for a cell without peepholes."""
    zeros = tf.zeros([units], dtype)
    return {"wci": zeros, "wcf": zeros, "wco": zeros, "use_peephole": False}


def _swapped(columns):
    """Exchanges the second and the third gate of the columns of a tensor."""
    i, f, c, o = tf.split(columns, 4, axis=-1)
    return tf.concat([i, c, f, o], axis=-1)


def _flat(sequence):
    """Reshapes (T, B, F) to (T*B, F)."""
    return tf.reshape(sequence, [-1, sequence.shape[-1]])
