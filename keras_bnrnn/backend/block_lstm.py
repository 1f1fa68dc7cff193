"""Runs an LSTM by TensorFlow's operations for CPUs, for `recurrence.block`.

`BlockLSTMV2` runs a block of timesteps of the forward loop in one operation. Its
gradient, `BlockLSTMGradV2`, projects and sums weight gradients in each timestep, which
is best for few rows and units. The other gradient here has the product with the
recurrent kernel and `LSTMBlockCellGrad` in its loop. It computes the other products for
blocks of timesteps, while their gradients are in the cache, so no tensor (T, B, 4U) is
stacked.

The forward loop keeps lists of the tensors of its blocks. The backward loop removes the
tensors of a block as it reads them, so their memory holds the gradients of the gates.
Where it is a loop, it computes the tanh of the cell states again.
"""

import tensorflow as tf

from keras_bnrnn.backend.loops import blocks_back, concatenated, ends, turns_back


def forward(
    frames,
    states,
    kernel,
    recurrent_kernel,
    bias,
    stacks,
    length,
    is_small,
    turns=None,
):
    """Runs the forward loop.

    Args:
        frames: float32 tensor of shape (T, B, D).
        states: List of two tensors (B, U): h and c.
        kernel: Tensor (D, 4U), gate order i, f, c, o.
        recurrent_kernel: Tensor (U, 4U).
        bias: Tensor (4U,), or `None`.
        stacks: The number of states that are stacked over time, 0 to 2.
        length: The number of timesteps of a block, an int or a tensor.
        is_small: Whether `backward` runs `BlockLSTMGradV2`, a boolean or a tensor. All
            timesteps are then one block.
        turns: As in `scan`.

    Returns:
        `(sequences, last, kept)`: the list of stacked states (T, B, U), the list of
        last states (B, U), and a list of tensors for `backward`.
    """
    units, dtype = recurrent_kernel.shape[0], frames.dtype
    timesteps, rows = tf.shape(frames)[0], tf.shape(frames)[1]
    weights = tf.concat([kernel, recurrent_kernel], axis=0)
    if bias is None:
        bias = tf.zeros([4 * units], dtype)
    no_peephole = _no_peephole(units, dtype)
    keeps_tanh = is_small is not False  # for `BlockLSTMGradV2`

    def run_block(start, end, h, c, lists):
        block = tf.raw_ops.BlockLSTMV2(
            seq_len_max=_turns(end - start, turns),
            x=frames[start:end],
            cs_prev=c,
            h_prev=h,
            w=weights,
            b=bias,
            cell_clip=0.0,
            **no_peephole,
        )
        tanh_c = [block.co] if keeps_tanh else []
        tensors = [
            block.i,
            block.f,
            block.o,
            block.ci,
            block.cs,
            block.h,
            *tanh_c,
            c,
            h,
        ]
        lists = tuple(
            tf.raw_ops.TensorListPushBack(input_handle=handle, tensor=tensor)
            for handle, tensor in zip(lists, tensors, strict=True)
        )
        return block.h[-1], block.cs[-1], lists

    batch = states[0].shape[0]
    sequence, state = (None, batch, units), (batch, units)
    lists = tuple(
        tf.raw_ops.EmptyTensorList(
            element_shape=[-1 if size is None else size for size in shape],
            max_num_elements=-1,
            element_dtype=dtype,
        )
        for shape in [sequence] * (6 + keeps_tanh) + [state] * 2
    )
    if is_small is True:
        h, c, lists = run_block(0, timesteps, *states, lists)
    else:
        length = tf.where(is_small, timesteps, length)
        _, (h, c, lists) = tf.while_loop(
            lambda k, _: k * length < timesteps,
            lambda k, values: (k + 1, run_block(*ends(k, length, timesteps), *values)),
            (tf.constant(0), (*states, lists)),
        )
    list_of_c, list_of_h = lists[4:6]
    sequences = [
        tf.ensure_shape(
            concatenated(handle, rows, units, dtype), (frames.shape[0], batch, units)
        )
        for handle in [list_of_h, list_of_c][:stacks]
    ]
    return sequences, [h, c], list(lists)


def backward(
    frames,
    states,
    kernel,
    recurrent_kernel,
    kept,
    d_sequences,
    d_last,
    length,
    is_small,
    turns=None,
):
    """Computes the gradients of `forward`.

    Args:
        frames, states, kernel, recurrent_kernel, turns: As in `forward`.
        kept: What `forward` returned.
        d_sequences: List of the gradients of the first sequences.
        d_last: List of the gradients of the last states.
        length, is_small: What `forward` got.

    Returns:
        The gradients of frames, h, c, kernel, recurrent kernel and bias.
    """
    arguments = (
        frames,
        states,
        kernel,
        recurrent_kernel,
        kept,
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


def step_gradient(
    recurrent_kernel, gate_i, gate_f, gate_o, candidate, c, c_before, dh, dc
):
    """Backpropagates through one step, except the recurrent product.

    Args:
        recurrent_kernel: Tensor (U, 4U), of which only the shape matters.
        gate_i, gate_f, gate_o, candidate: The gates of the step, float32 (B, U).
        c, c_before: The cell state after and before the step.
        dh, dc: The gradients of the states after the step.

    Returns:
        The gradient (B, 4U) of the pre-activations in the order i, c, f, o, and that of
        `c_before`.
    """
    units, dtype = gate_i.shape[-1], gate_i.dtype
    step = tf.raw_ops.LSTMBlockCellGrad(
        # The operation checks the shapes of these, and reads nothing else of them. With
        # an input of width 0 no other weights, large zeros, are made in each turn.
        x=tf.zeros([tf.shape(c)[0], 0], dtype),
        w=recurrent_kernel,
        b=tf.zeros([4 * units], dtype),
        h_prev=c_before,
        cs=c_before,
        cs_prev=c_before,
        i=gate_i,
        f=gate_f,
        o=gate_o,
        ci=candidate,
        co=tf.tanh(c),
        cs_grad=dc,
        h_grad=dh,
        **_no_peephole(units, dtype),
    )
    return step.dicfo, step.cs_prev_grad


def _in_one_operation(
    frames, states, kernel, recurrent_kernel, kept, d_sequences, d_last, turns
):
    """Does what `backward` does, by `BlockLSTMGradV2`."""
    width, units = frames.shape[-1], recurrent_kernel.shape[0]
    no_peephole = _no_peephole(units, frames.dtype)
    _, (gate_i, gate_f, gate_o, candidate, c, h, tanh_c, *_) = _popped(kept, states[0])

    def at_each_timestep(k):
        """Returns the gradient of a state at all timesteps, the last one included."""
        zeros = tf.zeros_like(h[:-1])
        last = tf.concat([zeros, d_last[k][None]], axis=0)
        return last + d_sequences[k] if len(d_sequences) > k else last

    gradient = tf.raw_ops.BlockLSTMGradV2(
        seq_len_max=_turns(tf.shape(frames)[0], turns),
        x=frames,
        cs_prev=states[1],
        h_prev=states[0],
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
    frames, states, kernel, recurrent_kernel, kept, d_sequences, d_last, turns, length
):
    """Does what `backward` does, in blocks of `length` timesteps."""
    dtype, width = frames.dtype, frames.shape[-1]
    units = recurrent_kernel.shape[0]
    timesteps, rows = tf.shape(frames)[0], tf.shape(frames)[1]
    # As `step_gradient` orders the gates.
    transposed = tf.transpose(swapped(recurrent_kernel))
    transposed_kernel = tf.transpose(swapped(kernel))

    def step_back(t, values, c_before, dh, dc):
        """Returns the gradients of h and c before the step, and those of the gates."""
        h_gradient = dh + d_sequences[0][t] if d_sequences else dh
        c_gradient = dc + d_sequences[1][t] if len(d_sequences) > 1 else dc
        d_gates, dc_before = step_gradient(
            recurrent_kernel, *values, c_before, h_gradient, c_gradient
        )
        return [tf.matmul(d_gates, transposed), dc_before], [d_gates]

    def run_block(start, end, carry):
        dh, dc, *lists = carry
        lists, tensors = _popped(lists, states[0])
        *gates, c, h = tensors[:6]
        values, (first_c, first_h) = [*gates, c], tensors[-2:]

        def body(t, carry):
            return step_back(
                t, [v[t - start] for v in values], c[t - start - 1], *carry
            )

        def first_step(t, carry):
            return step_back(t, [v[0] for v in values], first_c, *carry)

        carry, (d_gates,) = turns_back(
            body,
            [dh, dc],
            [((states[0].shape[0], 4 * units), dtype)],
            start,
            end,
            last=first_step,
        )
        # Slices of timesteps are no copies.
        of_recurrent = tf.matmul(_flat(h[:-1]), _flat(d_gates[1:]), transpose_a=True)
        of_first = tf.matmul(first_h, d_gates[0], transpose_a=True)
        flat = _flat(d_gates)
        terms = [
            tf.matmul(_flat(frames[start:end]), flat, transpose_a=True),
            of_recurrent + of_first,
            column_sums(flat),
        ]
        return [*carry, *lists], [d_gates], terms

    def finish(stacks):
        (d_gates,) = stacks
        product = tf.matmul(_flat(d_gates), transposed_kernel)
        return tf.reshape(product, [tf.shape(d_gates)[0], rows, width])

    (dh, dc, *_), d_frames, sums = blocks_back(
        run_block,
        [*d_last, *kept],
        [((states[0].shape[0], 4 * units), dtype)],
        timesteps,
        length,
        [
            tf.zeros(shape, dtype)
            for shape in ([width, 4 * units], [units, 4 * units], [4 * units])
        ],
        finish,
        width,
        turns,
    )
    return [tf.reshape(d_frames, tf.shape(frames)), dh, dc, *map(swapped, sums)]


def column_sums(x):
    """Sums a tensor (..., F) over all axes but the last.

    `BiasAddGrad` takes a quarter of the time of `tf.reduce_sum`. But it adds bfloat16
    in bfloat16: a sum of thousands of rows would lose all its digits.
    """
    exact = tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x
    return tf.cast(tf.raw_ops.BiasAddGrad(out_backprop=exact), x.dtype)


def _turns(timesteps, turns):
    """Returns the number of timesteps that an operation runs: all, or none."""
    if turns is not None:
        timesteps = tf.where(tf.equal(turns, 0), 0, timesteps)
    return tf.cast(timesteps, tf.int64)


def _popped(lists, state):
    """Removes the last tensor of each list that `forward` kept.

    Args:
        lists: The lists, some of them of tensors (n, B, U), the last two of (B, U).
        state: A tensor (B, U).

    Returns:
        The list of the lists, and the list of the tensors.
    """
    popped = [
        tf.raw_ops.TensorListPopBack(
            input_handle=handle,
            element_shape=tf.constant(-1),  # any
            element_dtype=state.dtype,
        )
        for handle in lists
    ]
    shapes = [(None, *state.shape)] * (len(lists) - 2) + [state.shape] * 2
    tensors = [
        tf.ensure_shape(element.tensor, shape)
        for element, shape in zip(popped, shapes, strict=True)
    ]
    return [element.output_handle for element in popped], tensors


def _no_peephole(units, dtype):
    """Returns the arguments of an operation for a cell without peepholes."""
    zeros = tf.zeros([units], dtype)
    return {"wci": zeros, "wcf": zeros, "wco": zeros, "use_peephole": False}


def swapped(columns):
    """Exchanges the second and the third gate of the columns (..., 4U) of a tensor."""
    i, f, c, o = tf.split(columns, 4, axis=-1)
    return tf.concat([i, c, f, o], axis=-1)


def _flat(sequence):
    """Reshapes (T, B, F) to (T*B, F)."""
    return tf.reshape(sequence, [-1, sequence.shape[-1]])
