"""Runs an LSTM by TensorFlow's operations for CPUs, for `recurrence.block`.

`BlockLSTMV2` runs all timesteps of the forward loop in one operation. The gradient of
TensorFlow projects and sums weight gradients in each timestep. The gradient here has
the product with the recurrent kernel and `LSTMBlockCellGrad` in its loop, and the
other products after the loop.
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
):
    """Computes the gradients of `forward`.

    Args:
        frames, states, kernel, recurrent_kernel, turns: As in `forward`.
        kept, sequences: What `forward` returned.
        d_sequences: List of the gradients of the first sequences.
        d_last: List of the gradients of the last states.

    Returns:
        The gradients of frames, h, c, kernel, recurrent kernel and bias.
    """
    units = recurrent_kernel.shape[0]
    timesteps = tf.shape(frames)[0]
    (first_h, first_c), (h, c) = states, sequences
    # The gradient of `LSTMBlockCellGrad` has the order i, c, f, o.
    transposed = tf.transpose(_swapped(recurrent_kernel))
    no_peephole = tf.zeros([units], frames.dtype)
    # The operation checks the shapes of these, and reads nothing else of them.
    no_input = tf.zeros([tf.shape(frames)[1], 1], frames.dtype)
    no_kernel = tf.zeros([1 + units, 4 * units], frames.dtype)
    no_bias = tf.zeros([4 * units], frames.dtype)

    def step_back(t, c_before, dh, dc, array):
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
        return through, step.cs_prev_grad, array.write(t, step.dicfo)

    def body(i, *carry):
        t = timesteps - 1 - i
        return i + 1, *step_back(t, c[t - 1], *carry)

    array = tf.TensorArray(
        frames.dtype,
        size=timesteps,
        element_shape=tf.TensorShape([frames.shape[1], 4 * units]),
    )
    # Timestep 0 follows the loop: it alone reads the cell state before the sequence.
    end = (timesteps if turns is None else turns) - 1
    _, *carry = tf.while_loop(
        lambda i, *_: i < end,
        body,
        (tf.constant(0), *d_last, array),
        maximum_iterations=timesteps,
        parallel_iterations=32,
    )
    dh, dc, array = step_back(0, first_c, *carry)
    stack = tf.raw_ops.TensorListStack(
        input_handle=array.flow,
        element_shape=tf.stack([tf.shape(frames)[1], 4 * units]),
        element_dtype=frames.dtype,
    )
    d_gates = tf.reshape(stack, [-1, 4 * units])
    d_kernel = tf.matmul(_flat(frames), d_gates, transpose_a=True)
    # A slice of timesteps is no copy.
    d_recurrent_kernel = tf.matmul(
        _flat(h[:-1]), _flat(stack[1:]), transpose_a=True
    ) + tf.matmul(first_h, stack[0], transpose_a=True)
    d_frames = tf.matmul(d_gates, _swapped(kernel), transpose_b=True)
    return [
        tf.reshape(d_frames, tf.shape(frames)),
        dh,
        dc,
        _swapped(d_kernel),
        _swapped(d_recurrent_kernel),
        _swapped(tf.reduce_sum(d_gates, axis=0)),
    ]


def _swapped(columns):
    """Exchanges the second and the third gate of the columns of a tensor."""
    i, f, c, o = tf.split(columns, 4, axis=-1)
    return tf.concat([i, c, f, o], axis=-1)


def _flat(sequence):
    """Reshapes (T, B, F) to (T*B, F)."""
    return tf.reshape(sequence, [-1, sequence.shape[-1]])
