"""Computes the recurrence of a stock Keras layer with few graph operations.

Each operation, and each iteration of a loop, costs about a microsecond. The loop
therefore has few operations, and an iteration computes several timesteps.
"""

import keras
import tensorflow as tf

# Timesteps in one iteration of the loop.
TURN = 4


class Recurrence:
    """The equations and weights of a stock layer.

    Args:
        layer: A `keras.layers.SimpleRNN`, `LSTM` or `GRU`.
        dtype: The dtype to compute with.
        joined: For an LSTM: kernel and recurrent kernel as one tensor, (D + U, 4U).
    """

    def __init__(self, layer, dtype, joined):
        cell = layer.cell
        self.activation = cell.activation
        self.gate = getattr(cell, "recurrent_activation", None)
        self.units = cell.units
        self.reset_after = getattr(cell, "reset_after", False)
        self.dtype = dtype
        self.step = {
            keras.layers.SimpleRNN: self._simple_rnn,
            keras.layers.LSTM: self._lstm,
            keras.layers.GRU: self._gru,
        }[type(layer)]

        def read(variable):
            return tf.cast(keras.ops.convert_to_tensor(variable), dtype)

        if joined is None:
            self.kernel = read(cell.kernel)
            self.recurrent_kernel = read(cell.recurrent_kernel)
            self.joined = None
        else:
            self.joined = tf.cast(joined, dtype)
            features = cell.kernel.shape[0]
            self.kernel = self.joined[:features]
            self.recurrent_kernel = self.joined[features:]
        self.bias = self.recurrent_bias = tf.zeros([self.kernel.shape[1]], dtype)
        if cell.use_bias:
            self.bias = read(cell.bias)
            if self.reset_after:
                self.bias, self.recurrent_bias = tf.unstack(self.bias)

    def one_step(self, frame, states, mask):
        """Returns the states after a frame (B, D)."""
        if self.joined is not None:
            both = tf.matmul(tf.concat([frame, states[0]], 1), self.joined)
            new = self._gated(tf.nn.bias_add(both, self.bias), states[1])
        else:
            projected = tf.nn.bias_add(tf.matmul(frame, self.kernel), self.bias)
            new = self.step(projected, states)
        return _where_valid(mask, new, states)

    @property
    def has_block(self):
        """Whether `block` can run the layer."""
        usual = (
            self.activation is keras.activations.tanh
            and self.gate is keras.activations.sigmoid
        )
        dtypes = (tf.float32, tf.float16)
        return self.joined is not None and usual and self.dtype in dtypes

    def run(self, frames, states, mask, lengths, wants_states):
        """Returns outputs (B, T, U) and the states after the last valid frame."""
        timesteps = tf.shape(frames)[1]
        if lengths is not None and wants_states and len(states) > 1:
            mask, lengths = tf.sequence_mask(lengths, timesteps), None
        outputs, *after = self._loop(frames, states, mask, timesteps)
        if lengths is not None:
            # The loop needs no mask, since its outputs at padding are discarded.
            outputs_too = tf.concat([states[0][:, None], outputs], 1)
            after[0] = tf.gather(outputs_too, lengths, batch_dims=1)
        return [outputs, *after]

    def block(self, frames, states, lengths):
        """Returns the outputs and states of `run`, computed by `BlockLSTMV2`."""
        h, c = states
        no_peephole = tf.zeros([self.units], self.dtype)
        _, cs, _, _, _, _, hs = tf.raw_ops.BlockLSTMV2(
            seq_len_max=tf.shape(frames, tf.int64)[1],
            x=tf.transpose(frames, [1, 0, 2]),
            cs_prev=c,
            h_prev=h,
            w=self.joined,
            wci=no_peephole,
            wcf=no_peephole,
            wco=no_peephole,
            b=self.bias,
        )
        # The states after 0, 1, ..., T frames.
        hs, cs = (tf.concat([s[None], y], 0) for s, y in ((h, hs), (c, cs)))
        if lengths is None:
            states = [hs[-1], cs[-1]]
        else:
            rows = tf.range(tf.shape(lengths)[0])
            where = tf.stack([lengths, rows], axis=1)
            states = [tf.gather_nd(hs, where), tf.gather_nd(cs, where)]
        outputs = tf.transpose(hs[1:], [1, 0, 2])
        return [outputs, *states]

    def _loop(self, frames, states, mask, timesteps):
        frames = tf.transpose(frames, [1, 0, 2])
        projected = tf.matmul(tf.reshape(frames, [-1, frames.shape[2]]), self.kernel)
        projected = tf.reshape(
            tf.nn.bias_add(projected, self.bias),
            [timesteps, -1, self.kernel.shape[1]],
        )
        projected.set_shape([None, frames.shape[1], self.kernel.shape[1]])
        if mask is not None:
            mask = tf.transpose(mask)[..., None]  # (T, B, 1)

        def turn(width):
            def body(t, states, outputs):
                for _ in range(width):
                    valid = None if mask is None else tf.gather(mask, t)
                    new = self.step(tf.gather(projected, t), states)
                    states = _where_valid(valid, new, states)
                    outputs = outputs.write(t, states[0])
                    t += 1
                return t, states, outputs

            return body

        outputs = tf.TensorArray(
            self.dtype,
            size=tf.maximum(timesteps, 1),
            element_shape=states[0].shape,
            infer_shape=False,
        )
        # `stack` fails if no element was written. Writes one, in case T is 0.
        loop = (0, states, outputs.write(0, states[0]))
        whole = timesteps // TURN * TURN
        loop = tf.while_loop(lambda t, *_: t < whole, turn(TURN), loop)
        loop = tf.while_loop(lambda t, *_: t < timesteps, turn(1), loop)
        _, states, outputs = loop
        outputs = tf.transpose(outputs.stack()[:timesteps], [1, 0, 2])
        return [outputs, *states]

    def _simple_rnn(self, projected, states):
        return [
            self.activation(projected + tf.matmul(states[0], self.recurrent_kernel))
        ]

    def _lstm(self, projected, states):
        h, c = states
        return self._gated(projected + tf.matmul(h, self.recurrent_kernel), c)

    def _gated(self, a, c):
        i, f, candidate, o = tf.split(a, 4, axis=-1)  # (B, U) each
        c = self.gate(f) * c + self.gate(i) * self.activation(candidate)
        return [self.gate(o) * self.activation(c), c]

    def _gru(self, projected, states):
        (h,) = states
        units = self.units
        x_zr, x_h = tf.split(projected, [2 * units, units], axis=-1)  # z, r; h
        if self.reset_after:
            recurrent = tf.nn.bias_add(
                tf.matmul(h, self.recurrent_kernel), self.recurrent_bias
            )
            r_zr, r_h = tf.split(recurrent, [2 * units, units], axis=-1)
            z, r = tf.split(self.gate(x_zr + r_zr), 2, axis=-1)
            candidate = self.activation(x_h + r * r_h)
        else:
            of_zr, of_h = (
                self.recurrent_kernel[:, : 2 * units],
                self.recurrent_kernel[:, 2 * units :],
            )
            z, r = tf.split(self.gate(x_zr + tf.matmul(h, of_zr)), 2, axis=-1)
            candidate = self.activation(x_h + tf.matmul(r * h, of_h))
        return [z * h + (1 - z) * candidate]


def _where_valid(valid, new, old):
    if valid is None:
        return new
    return [tf.where(valid, a, b) for a, b in zip(new, old, strict=True)]
