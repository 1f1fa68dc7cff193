"""The time loop that all cells share, and the one place that depends on the backend.

A cell hands the loop an elementwise step. The loop owns the recurrent product, the
mask, the direction, the states and what is collected over time.
"""

import keras


def time_loop(
    step,
    projected,
    states,
    recurrent_kernel,
    mask=None,
    recurrent_dropout_mask=None,
    go_backwards=False,
    unroll=False,
    return_sequences=True,
    collected=(),
):
    """Runs `step` over the timesteps of a projected sequence.

    Where a frame is not valid, the states stay as they are.

    Args:
        step: Function `(projected_t, recurrent_t, states, valid_t)` to
            `(new_states, collected_t)`: what the input projection and the recurrent
            product, each (B, ...), make of the list of states. `valid_t` is a
            boolean tensor (B, 1), or `None` without a mask.
        projected: Tensor of shape (B, T, G*U), the input projection.
        states: List of tensors of shape (B, U); the first one is the output.
        recurrent_kernel: Tensor of shape (U, ...), multiplied by the output.
        mask: Boolean tensor of shape (B, T), or `None`.
        recurrent_dropout_mask: Tensor of shape (B, U) that multiplies the output
            on its way to the recurrent product, or `None`.
        go_backwards: Whether to run from the last timestep to the first.
        unroll: Whether to write the loop out; T must be static.
        return_sequences: Whether outputs are kept.
        collected: `(shape, dtype)` of each tensor in `collected_t`.

    Returns:
        `(outputs, states, collected)`, outputs of shape (B, T, U) in the order of
        processing, or `None`; each collected tensor with T in front.

    Raises:
        NotImplementedError: On a Keras backend other than TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise NotImplementedError(
            "The recurrent layers of keras_bnrnn run on the TensorFlow backend of "
            "Keras: set the environment variable KERAS_BACKEND=tensorflow. "
            f"Received: backend={keras.backend.backend()!r}"
        )
    import tensorflow as tf

    def time_major(x):
        x = tf.transpose(x, [1, 0, *range(2, len(x.shape))])
        return tf.reverse(x, [0]) if go_backwards else x

    sequences = [time_major(projected)]  # (T, B, G*U)
    if mask is not None:
        sequences.append(time_major(mask)[..., None])  # (T, B, 1)

    def advance(states, projected_t, valid_t=None):
        output = states[0]
        if recurrent_dropout_mask is not None:
            output = output * recurrent_dropout_mask
        new_states, collected_t = step(
            projected_t, tf.matmul(output, recurrent_kernel), states, valid_t
        )
        if valid_t is not None:
            new_states = [
                tf.where(valid_t, new, old)
                for new, old in zip(new_states, states, strict=True)
            ]
        return new_states, tuple(collected_t)

    timesteps = sequences[0].shape[0]
    specs = tuple((tf.TensorShape(shape), dtype) for shape, dtype in collected)
    if return_sequences:
        specs = ((states[0].shape, states[0].dtype), *specs)

    def kept(states, collected_t):
        return (states[0], *collected_t) if return_sequences else collected_t

    if unroll:
        history = []
        for t in range(timesteps):
            states, collected_t = advance(states, *(s[t] for s in sequences))
            history.append(kept(states, collected_t))
        stacked = [tf.stack(values) for values in zip(*history, strict=True)]
    else:
        if timesteps is None:
            timesteps = tf.shape(sequences[0])[0]
        inputs = [
            tf.TensorArray(s.dtype, size=timesteps, element_shape=s.shape[1:]).unstack(
                s
            )
            for s in sequences
        ]
        outputs = tuple(
            tf.TensorArray(dtype, size=timesteps, element_shape=shape)
            for shape, dtype in specs
        )

        def body(t, states, outputs):
            states, collected_t = advance(list(states), *(a.read(t) for a in inputs))
            outputs = tuple(
                a.write(t, value)
                for a, value in zip(outputs, kept(states, collected_t), strict=True)
            )
            return t + 1, tuple(states), outputs

        _, states, outputs = tf.while_loop(
            lambda t, *_: t < timesteps,
            body,
            (tf.constant(0), tuple(states), outputs),
            # Known to be finite, the loop can be differentiated under XLA.
            maximum_iterations=timesteps,
            parallel_iterations=32,
            swap_memory=True,
        )
        stacked = [a.stack() for a in outputs]

    outputs = None
    if return_sequences:
        outputs = tf.transpose(stacked.pop(0), [1, 0, 2])  # (B, T, U)
    return outputs, list(states), stacked
