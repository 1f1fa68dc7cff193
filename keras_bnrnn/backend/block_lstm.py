"""Runs an LSTM by TensorFlow's operations for CPUs, for `recurrence.block`.

`BlockLSTMV2` runs all timesteps of the forward loop in one operation. The gradient of
TensorFlow projects and sums weight gradients in each timestep. The gradient here has
the product with the recurrent kernel and `LSTMBlockCellGrad` in its loop. It computes
the other products for blocks of timesteps, while their gradients are in the cache, so
no tensor (T, B, 4U) is stacked.
"""

import tensorflow as tf


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
    no_peephole = tf.zeros([units], frames.dtype)
    block = tf.raw_ops.BlockLSTMV2(
        seq_len_max=tf.cast(tf.shape(frames)[0] if turns is None else turns, tf.int64),
        x=frames,
        cs_prev=c,
        h_prev=h,
        w=tf.concat([kernel, recurrent_kernel], axis=0),
        wci=no_peephole,
        wcf=no_peephole,
        wco=no_peephole,
        b=bias,
        cell_clip=0.0,
        use_peephole=False,
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
):
    """Computes the gradients of `forward`.

    Args:
        frames, states, kernel, recurrent_kernel, turns: As in `forward`.
        kept, sequences: What `forward` returned.
        d_sequences: List of the gradients of the first sequences.
        d_last: List of the gradients of the last states.
        length: The number of timesteps of a block, an int or a tensor.

    Returns:
        The gradients of frames, h, c, kernel, recurrent kernel and bias.
    """
    dtype, width = frames.dtype, frames.shape[-1]
    units = recurrent_kernel.shape[0]
    timesteps, rows = tf.shape(frames)[0], tf.shape(frames)[1]
    (first_h, first_c), (h, c) = states, sequences
    # The gradient of `LSTMBlockCellGrad` has the order i, c, f, o.
    transposed = tf.transpose(_swapped(recurrent_kernel))
    transposed_kernel = tf.transpose(_swapped(kernel))
    no_peephole = tf.zeros([units], dtype)
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
            wci=no_peephole,
            wcf=no_peephole,
            wco=no_peephole,
            b=no_bias,
            i=gate_i,
            cs=c_before,
            f=gate_f,
            o=gate_o,
            ci=candidate,
            co=tanh_c,
            cs_grad=c_gradient,
            h_grad=h_gradient,
            use_peephole=False,
        )
        through = tf.matmul(step.dicfo, transposed)
        return step.dicfo, through, step.cs_prev_grad

    def added(sums, frames, h_before, d_gates):
        """Adds gradients (rows, 4U) to those of kernel, recurrent kernel and bias."""
        d_kernel, d_recurrent_kernel, d_bias = sums
        return [
            d_kernel + tf.matmul(frames, d_gates, transpose_a=True),
            d_recurrent_kernel + tf.matmul(h_before, d_gates, transpose_a=True),
            d_bias + tf.reduce_sum(d_gates, axis=0),
        ]

    # Block k starts at timestep 1 + k * length. The last block may be shorter.
    blocks = -((1 - timesteps) // length)
    if turns is not None:
        blocks = tf.where(turns > 0, blocks, 0)

    def array_of(width):
        return tf.TensorArray(
            dtype,
            size=blocks,
            element_shape=tf.TensorShape([None, width]),
            infer_shape=False,
        )

    def block_back(k, dh, dc, sums, array):
        start = 1 + k * length
        end = tf.minimum(start + length, timesteps)
        shape = tf.stack([rows, 4 * units])

        def body(t, dh, dc, steps):
            d_gates, dh, dc = step_back(t, c[t - 1], dh, dc)
            steps = tf.raw_ops.TensorListSetItem(
                input_handle=steps, index=t - start, item=d_gates
            )
            return t - 1, dh, dc, steps

        steps = tf.raw_ops.TensorListReserve(
            element_shape=shape, num_elements=end - start, element_dtype=dtype
        )
        _, dh, dc, steps = tf.while_loop(
            lambda t, *_: t >= start,
            body,
            (end - 1, dh, dc, steps),
            parallel_iterations=32,
        )
        stack = tf.raw_ops.TensorListStack(
            input_handle=steps, element_shape=shape, element_dtype=dtype
        )
        d_gates = tf.reshape(stack, [-1, 4 * units])
        # Slices of timesteps are no copies.
        sums = added(
            sums, _flat(frames[start:end]), _flat(h[start - 1 : end - 1]), d_gates
        )
        return k - 1, dh, dc, sums, array.write(k, d_gates)

    zeros = [
        tf.zeros(shape, dtype)
        for shape in ([width, 4 * units], [units, 4 * units], [4 * units])
    ]
    _, dh, dc, sums, array = tf.while_loop(
        lambda k, *_: k >= 0,
        block_back,
        (blocks - 1, *d_last, zeros, array_of(4 * units)),
    )
    # Timestep 0 follows the loop: it alone reads the states before the sequence.
    d_gates, dh, dc = step_back(0, first_c, dh, dc)
    sums = added(sums, frames[0], first_h, d_gates)
    # TensorFlow removes this loop if nothing needs the gradient of the frames.
    _, d_frames = tf.while_loop(
        lambda k, *_: k < blocks,
        lambda k, array_of_d: (
            k + 1,
            array_of_d.write(k, tf.matmul(array.read(k), transposed_kernel)),
        ),
        (tf.constant(0), array_of(width)),
    )
    d_frames = tf.concat(
        [tf.matmul(d_gates, transposed_kernel), d_frames.concat()], axis=0
    )
    return [tf.reshape(d_frames, tf.shape(frames)), dh, dc, *map(_swapped, sums)]


def _swapped(columns):
    """Exchanges the second and the third gate of the columns of a tensor."""
    i, f, c, o = tf.split(columns, 4, axis=-1)
    return tf.concat([i, c, f, o], axis=-1)


def _flat(sequence):
    """Reshapes (T, B, F) to (T*B, F)."""
    return tf.reshape(sequence, [-1, sequence.shape[-1]])
